"""Slurm: a generated batch script. Everything of an attempt lies beside the run, on storage that all nodes
share.

``<parent of run_dir>/.quartet/<id>/`` (mode 0700) holds the script, the log, Slurm's job id, and one folder
per restart with Ray's logs, the token and the exit code. Slurm forgets finished jobs; the folder does not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from launch import scale as scaling
from launch.graceful import CHECKPOINTED
from launch.submit import capacity, sbatch
from launch.submit.job import Job, Report, State, TargetSettings
from launch.submit.polling import wait_until
from launch.submit.slurm_settings import CONFIG
from launch.submit.targets.local import folder_of
from launch.submit.working_dir import ROOT
from orchestrator.config import Run
from orchestrator.placement import Resources

__all__ = ["CONFIG", "Target"]
assert issubclass(CONFIG, TargetSettings)
COMMAND_TIMEOUT_S = 60
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT")


class Target:
    def __init__(self, settings: CONFIG) -> None:
        self.settings = settings

    def render(self, job: Job) -> str:
        folder = str(folder_of(job.run, job.id))
        return sbatch.script(job, self.settings, folder=folder, root=str(ROOT), ray=metadata.version("ray"))

    def lint(self, job: Job) -> list[str]:
        checked = subprocess.run(
            ["bash", "-n"], input=self.render(job), capture_output=True, text=True, check=False
        )
        found = [f"the script is not bash: {checked.stderr.strip()}"] if checked.returncode else []
        if self.settings.requeue and job.run.rl and not job.run.rl.save_every:
            found.append(
                "requeue=true and rl.save_every=0: a requeued job would start over; set rl.save_every"
            )
        return found

    def preflight(self, job: Job) -> list[str]:
        wanted = ["-p", self.settings.partition] if self.settings.partition else []
        rows = [
            row.split("|") for row in slurm("sinfo", "-h", "-N", "-o", "%N|%c|%G|%T", *wanted).splitlines()
        ]
        there = {name: (float(cpus), gres) for name, cpus, gres, state in rows if "down" not in state}
        if len(there) < self.settings.nodes:
            return [
                f"nodes={self.settings.nodes}, but Slurm has {len(there)} usable ({', '.join(there)}); "
                f"lower it"
            ]
        largest = sorted(there.values(), key=lambda node: -node[0])[: self.settings.nodes]
        short = [gres for _, gres in largest if gpus(gres) < self.settings.gpus_per_node]
        if short:
            return [f"gpus_per_node={self.settings.gpus_per_node}, but a node has {short[0]}; lower it"]
        return capacity.too_large(job.run, [self._node(cpus) for cpus, _ in largest])

    def _node(self, cpus: float) -> Resources:
        """What Ray counts of a node with so many CPUs."""
        return {"CPU": self.settings.cpus_per_node or cpus, "GPU": self.settings.gpus_per_node}

    def submit(self, job: Job) -> None:
        folder = folder_of(job.run, job.id)
        folder.mkdir(parents=True, mode=0o700)
        try:
            (folder / "run.yaml").write_text(job.config)
            (folder / "script").write_text(self.render(job))
            (folder / "job").write_text(
                slurm("sbatch", "--parsable", "--export=NIL", str(folder / "script")).strip()
            )
        except BaseException:
            shutil.rmtree(folder)
            raise

    def reports(self, run: Run) -> list[Report]:
        base = folder_of(run, "")
        return [report(folder) for folder in sorted(base.glob(f"{run.name}-*"))] if base.exists() else []

    def logs(self, run: Run, id: str, *, follow: bool) -> Iterator[str]:
        log = folder_of(run, id) / "log"
        if log.exists():
            yield log.read_text(errors="replace")

    def scale(self, run: Run, id: str, engines: int) -> str:
        """The allocation stays as large as it is: more than it can hold is refused here; what is taken in it
        now, only the run knows."""
        at_work = scaling.scalable(run.run_dir, engines)
        nodes = job_fields(folder_of(run, id))["NodeList"]
        rows = slurm("sinfo", "-h", "-N", "-o", "%N|%c", "-n", nodes).splitlines()
        cpus = dict(row.split("|") for row in rows)  # a node in two partitions has two rows
        engine = at_work.engine.model_copy(update={"replicas": engines})
        wanted = at_work.model_copy(update={"engine": engine})
        if why := capacity.too_large(wanted, [self._node(float(count)) for count in cpus.values()]):
            raise ValueError(f"engine={engines} is more than the allocation of {id} can hold:\n{why[0]}")
        scaling.ask(at_work, run.run_dir, scaling.Wish(engines=engines, by=scaling.BY_COMMAND))
        return (
            f"{id} was asked for {engines} engine(s); its log says when they serve or have left, or how many "
            "the allocation has room for"
        )

    def stop(self, run: Run, id: str) -> None:
        folder = folder_of(run, id)
        number = (folder / "job").read_text()
        if report(folder).state is State.PENDING:
            slurm("scancel", number)
        else:
            slurm("scancel", "--batch", "--signal=TERM", number)
        try:
            over = lambda: report(folder).state.is_over  # noqa: E731
            wait_until(over, self.settings.stop_grace_s, f"{id} still runs after stop_grace_s")
        except ValueError:
            slurm("scancel", number)
            wait_until(over, self.settings.stop_grace_s, f"{id} still runs; see `scontrol show job {number}`")


def report(folder: Path) -> Report:
    """From Slurm while it knows the job, from the folder afterwards."""
    fields = job_fields(folder)
    state, code = fields.get("JobState"), int(fields.get("ExitCode", "0:0").split(":")[0])
    if state in WAITING:
        return Report(id=folder.name, state=State.PENDING, message=fields.get("Reason", ""))
    if state in RUNNING:
        return Report(id=folder.name, state=State.RUNNING)
    if state is None:
        codes = sorted(folder.glob("restart-*/exit_code"), key=lambda file: file.stat().st_mtime)
        if not codes:
            why = "Slurm no longer knows the job, and it wrote no exit code: its node died; resume it"
            return Report(id=folder.name, state=State.FAILED, message=why)
        code = int(codes[-1].read_text())
        state = "COMPLETED" if code == 0 else "FAILED"
    if state == "COMPLETED":
        return Report(id=folder.name, state=State.SUCCEEDED, exit_code=0)
    stopped = state == "CANCELLED" or code == CHECKPOINTED
    exit_code = None if state == "CANCELLED" else code
    return Report(
        id=folder.name, state=State.STOPPED if stopped else State.FAILED, exit_code=exit_code, message=state
    )


def job_fields(folder: Path) -> dict[str, str]:
    """What Slurm says of the job: {"JobState": "RUNNING", "NodeList": "n[1-3]", ...}; nothing of one that it
    has forgotten."""
    shown = slurm("scontrol", "show", "job", "-o", (folder / "job").read_text(), check=False)
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def gpus(gres: str) -> int:
    """Of sinfo's column: "gpu:8", "gpu:h100:8(S:0-1)" and "(null)" are 8, 8 and 0."""
    return sum(int(count) for count in re.findall(r"gpu:(?:[^:,(]+:)?(\d+)", gres))


def slurm(*command: str, check: bool = True) -> str:
    """Standard output of a Slurm command; ValueError with what it said."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not on PATH; submit from a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} took more than {COMMAND_TIMEOUT_S} s; is slurmctld up?") from None
    if check and answer.returncode:
        raise ValueError(f"{command[0]}: {answer.stderr.strip()}")
    return answer.stdout
