"""What the planner needs from outside: configurations of models, this machine's memory. Loads no torch."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil

from orchestrator.config import Run, Workers
from orchestrator.plan.devices import DEVICES, Cluster, Device
from orchestrator.plan.fit import Planned, fits
from orchestrator.plan.memory import Overheads
from orchestrator.plan.remedy import why_not
from orchestrator.plan.shapes import Shape, named_shape, read_shape
from orchestrator.plan.stages import Shapes
from orchestrator.plan.workload import Workload, workload

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def shapes_of(run: Run) -> Shapes:
    """Of every model the run names. ValueError when a configuration cannot be read."""
    named = {
        role: own.model
        for role in ("actor", "critic", "reward", "reference")
        if (own := getattr(run.roles, role)) is not None and own.model
    }
    if run.reward_model is not None and run.reward_model.model and "reward" not in named:
        named["reward"] = run.reward_model.model
    by_role = {role: _shape(path, None, field=f"roles.{role}.model") for role, path in named.items()}
    if run.task is not None and not Path(run.model.path, "config.json").is_file():
        return Shapes(base=_task_shape(run), by_role=by_role)
    return Shapes(base=_shape(run.model.path, run.model.revision, field="model.path"), by_role=by_role)


def _task_shape(run: Run) -> Shape:
    """The small model that the task makes."""
    import transformers  # noqa: PLC0415 - a task writes its model, and needs torch for it

    from launch import tasks  # noqa: PLC0415

    assert run.task is not None
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        return read_shape(tasks.prepare(run.task, Path(folder)).model / "config.json", field="task")


def _shape(path: str, revision: str | None, *, field: str) -> Shape:
    folder = Path(path)
    if folder.is_dir():
        return read_shape(folder / "config.json", field=field)
    known = named_shape(path)
    if known is not None:
        return known
    # Only where there is a Hub to ask.
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    try:
        return read_shape(Path(hf_hub_download(path, "config.json", revision=revision)), field=field)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{field}={path!r} has no config.json that can be read ({reason}); give a model folder, a Hub "
            "id that "
            "is reachable from here, or the id of a known shape, e.g. Qwen/Qwen2.5-7B or "
            "meta-llama/Llama-3.1-70B"
        ) from error


def this_machine() -> Cluster:
    """Its cores, and its memory or what the control group allows of it."""
    memory = psutil.virtual_memory().total
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        memory = min(memory, int(limit))
    return Cluster(nodes=1, per_node=os.cpu_count() or 1, device=DEVICES["cpu"], host_memory=memory)


def this_gpu_machine() -> Cluster | None:
    """The GPUs of this machine as the driver names them; None where there are none. Claims none of them."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    sheet = next((d for d in DEVICES.values() if not d.is_cpu and d.name in seen.name), DEVICES["H100"])
    device = Device(
        name=seen.name,
        memory=seen.total_memory,
        flops=sheet.flops,
        bandwidth=sheet.bandwidth,
        link=sheet.link,
        host_memory=sheet.host_memory,
        source=sheet.source,
    )
    return Cluster(
        nodes=1, per_node=torch.cuda.device_count(), device=device, host_memory=psutil.virtual_memory().total
    )


def refuse_what_cannot_fit(run: Run) -> None:
    """ValueError with what is too large and the knob that makes it fit. Only for a Ray of our own: of another
    cluster this machine knows nothing. Only what is too large even if every estimate is too high."""
    if run.ray_address or os.environ.get("RAY_ADDRESS"):
        return
    gpus = any(place.gpus for place in (run.engine, *_roles(run)))
    cluster = this_gpu_machine() if gpus else this_machine()
    if cluster is None:
        return  # the placement says so: it asks for GPUs that are not here
    cluster = replace(cluster, per_node=2**20)  # whether there are enough is the placement's to say
    planned = Planned(
        run=run, shapes=shapes_of(run), cluster=cluster, workload=longest_workload(run), overheads=Overheads()
    )
    for fit in fits(planned):
        if fit.cannot:
            raise ValueError(f"the run cannot fit this machine: {why_not(planned, fit)}")


def longest_workload(run: Run) -> Workload | None:
    return None if run.rl is None else workload(run, run.rl, prompt=None, response=None)


def _roles(run: Run) -> list[Workers]:
    table = run.roles
    return [own for own in (table.actor, table.critic, table.reward, table.reference) if own is not None]
