"""Whether the run's workers fit on this machine, asked before Ray starts and a model is loaded.

On a cluster that is already running, the cluster is asked instead, within ``placement.timeout_s``.
"""

import os
import resource

from orchestrator.config import Run
from orchestrator.placement import Resources, layout, shortage, stage_roles

MIN_OPEN_FILES = 256  # a worker has some 80 open, Ray's own processes as many


def refuse_what_has_no_place(run: Run, *, num_gpus: int, num_cpus: int | None = None) -> None:
    """ValueError with what a stage asks for, what this machine has and which number to lower. Nothing is
    said of a run that goes to a running cluster."""
    if run.ray_address or os.environ.get("RAY_ADDRESS"):
        return
    if 0 <= (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < MIN_OPEN_FILES:
        raise ValueError(
            f"a process may have {files} files open, and Ray needs {MIN_OPEN_FILES}; raise it: ulimit -n 4096"
        )
    machine: Resources = {"CPU": float(num_cpus or os.cpu_count() or 1), "GPU": float(num_gpus)}
    for stage, roles in stage_roles(run):
        if why := shortage(run, layout(run, roles), [machine]):
            raise ValueError(f"the {stage} stage does not fit on this machine:\n{why}")
