"""This machine: a process of its own that outlives the terminal, with its log and exit code in a folder.

Everything of an attempt lies in ``<parent of run_dir>/.quartet/<id>/``, readable by its owner only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from launch.locks import lock_is_held
from launch.submit.job import CHECKPOINTED, Job, Report, State, TargetSettings, entrypoint, shell
from launch.submit.polling import POLL_S, wait_until
from orchestrator.config import Run


class CONFIG(TargetSettings):
    kind: Literal["local"] = "local"


class Target:
    def __init__(self, settings: CONFIG) -> None:
        self.settings = settings

    def render(self, job: Job) -> str:
        folder = folder_of(job.run, job.id)
        return f"# {folder / 'run.yaml'}\n{job.config}\n# command\n{shell(self._command(job))}\n"

    def lint(self, job: Job) -> list[str]:
        return []

    def preflight(self, job: Job) -> list[str]:
        missing = [
            f"{name}: {file}" for name, file in self.settings.secrets.items() if not Path(file).is_file()
        ]
        return [f"secrets: no such file ({item}); write it, or take the name out" for item in missing]

    def submit(self, job: Job) -> None:
        folder = folder_of(job.run, job.id)
        folder.mkdir(parents=True, mode=0o700)
        try:
            (folder / "run.yaml").write_text(job.config)
            supervise = [sys.executable, "-m", "launch.submit.supervise", str(folder), "--"]
            subprocess.Popen(
                [*supervise, *self._command(job)], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            wait_until(lambda: (folder / "pid").exists(), 20, f"the job did not start; see {folder}")
        except BaseException:
            shutil.rmtree(folder)
            raise

    def reports(self, run: Run) -> list[Report]:
        base = folder_of(run, "")
        return [report(folder) for folder in sorted(base.glob(f"{run.name}-*"))] if base.exists() else []

    def logs(self, run: Run, id: str, *, follow: bool) -> Iterator[str]:
        folder = folder_of(run, id)
        with open(folder / "log") as log:
            while True:
                over = report(folder).state.is_over
                if text := log.read():
                    yield text
                elif over or not follow:
                    return
                else:
                    time.sleep(POLL_S)

    def stop(self, run: Run, id: str) -> None:
        folder = folder_of(run, id)
        supervisor, job = map(int, (folder / "pid").read_text().split())
        os.kill(supervisor, signal.SIGTERM)
        deadline = time.monotonic() + self.settings.stop_grace_s
        while not report(folder).state.is_over:
            if time.monotonic() > deadline:
                os.kill(job, signal.SIGKILL)
                deadline += self.settings.stop_grace_s
            time.sleep(POLL_S)

    def _command(self, job: Job) -> list[str]:
        config = str(folder_of(job.run, job.id) / "run.yaml")
        return entrypoint(config, resume=job.resume, secrets=self.settings.secrets, python=sys.executable)


def folder_of(run: Run, id: str) -> Path:
    return run.run_dir.absolute().parent / ".quartet" / id


def report(folder: Path) -> Report:
    """Running while the lock is held; over when the exit code is there; lost when neither is."""
    code = folder / "exit_code"
    if not code.exists() and lock_is_held(folder / "lock"):
        return Report(id=folder.name, state=State.RUNNING)
    if not code.exists():
        why = "the machine or the supervisor died before the job ended; `quartet resume` goes on"
        return Report(id=folder.name, state=State.FAILED, message=why)
    status = int(code.read_text())
    signalled = {CHECKPOINTED, 128 + signal.SIGTERM, 128 + signal.SIGKILL}
    state = State.SUCCEEDED if status == 0 else State.STOPPED if status in signalled else State.FAILED
    return Report(id=folder.name, state=state, exit_code=status)
