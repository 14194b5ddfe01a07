"""The run directory: who may write into it, what it remembers of finished stages.

config.yaml   the resolved run            roster.json    every process
owner         who holds the directory
stages.json   what has finished           metrics.jsonl  one line per step
<stage>/      a stage's own files         model/         the result
model_ema/    the average of its weights, where rl.ema_decay keeps one
"""

import fcntl
import json
import os
import shutil
import socket
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.config import Run
from orchestrator.configfile import write_run
from orchestrator.durable import replace_durably

LEAST_FREE_BYTES = 2**26  # logs and manifests; checkpoints ask for more
OWNER = "owner"  # who holds the directory: "pid 4711 on node-3"

StageResult = dict[str, str | int | float]  # "model" -> folder, and the stage's figures


class RunFolder(AbstractContextManager["RunFolder"]):
    """Held exclusively while the run lasts; a second run on the same directory is refused at once."""

    def __init__(self, run: Run, *, resume: bool, fresh: bool) -> None:
        self.path = run.run_dir.absolute()
        self._run, self._resume, self._fresh = run, resume, fresh

    def __enter__(self) -> Self:
        config = self.path / "config.yaml"
        _check_writable(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)  # of the folder: the lock goes with the process
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(
                f"run_dir={self.path} is in use by another run ({self._owner()}); wait for it, stop it, or "
                "choose another run_dir"
            ) from None
        try:
            self._check_contents(config)
            if self._fresh:
                for entry in self.path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_run(self._run, config)
            (self.path / OWNER).write_text(f"pid {os.getpid()} on {socket.gethostname()}")
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _check_contents(self, config: Path) -> None:
        if (self.path / "metrics.jsonl").exists() and not (self._resume or self._fresh):
            raise ValueError(
                f"run_dir={self.path} already holds a run; go on with --resume, start over with --fresh "
                "(deletes it), or choose another run_dir"
            )
        if not config.exists() and any(self.path.iterdir()):
            raise ValueError(
                f"run_dir={self.path} holds files that are no run of Quartet; choose another run_dir"
            )

    def _owner(self) -> str:
        """Who holds the lock, as it wrote itself down."""
        try:
            return (self.path / OWNER).read_text()
        except OSError:
            return "just starting"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def finished(self) -> dict[str, StageResult]:
        """The stages that are done, with their results."""
        path = self.path / "stages.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def finish(self, stage: str, result: StageResult) -> None:
        replace_durably(self.path / "stages.json", json.dumps({**self.finished(), stage: result}, indent=1))


def _check_writable(path: Path) -> None:
    """ValueError when nothing can be written to the directory, or to the first of its parents that exists."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"run_dir={path} cannot be written: {there} is {'read-only' if there.is_dir() else 'no folder'} "
            "for this user; choose another run_dir"
        )
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE_BYTES:
        raise ValueError(
            f"run_dir={path} has {free / 2**20:.0f} MiB left on its disk; make room or choose another run_dir"
        )
