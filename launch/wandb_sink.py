"""Weights & Biases in a child process of its own, fed with JSON lines.

Why a process and not only a thread: wandb registers an exit hook that waits for its service, and with a
server that accepts and never answers it held the driver for 60 s after the run (wandb 0.31,
``finish_timeout`` notwithstanding). A child can be killed. It also keeps wandb's environment and exit hooks
out of the driver.

    driver thread (SideCar)        child (``python -m launch.wandb_sink``)
    open    start the child        reads line 1: the settings; wandb.init
    log     write a line     --->  run.log; a full pipe blocks the thread, never the driver
    close   close the pipe   --->  end of file: run.finish, then exits; killed by SIGALRM if that takes
    ORPHAN_S abandon kill the child and its wandb service
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil

from launch.sidecar import Record
from orchestrator.config import Run

ORPHAN_S = 30  # the driver may be gone: nobody else ends a child that hangs


class WandbSink:
    def __init__(self, run: Run) -> None:
        self._folder = run.run_dir / "wandb"
        self._settings = {
            "project": run.tracking.wandb_project,
            "name": run.name,
            "mode": run.tracking.wandb,
            "dir": str(run.run_dir.absolute()),
            "config": run.model_dump(mode="json"),
        }
        self._child: subprocess.Popen[str] | None = None

    def open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "child.log").open("a") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "launch.wandb_sink"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=_environment(self._folder),
                start_new_session=True,  # Ctrl-C is for the driver, which then closes the pipe
            )
        self._write({**self._settings, "id": _run_id(self._folder / "run_id")})

    def log(self, record: Record) -> None:
        self._write({**record.finite(), f"{record.stage}/step": record.step})

    def close(self) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
            if code := self._child.wait():
                raise ChildProcessError(
                    f"its process ended with status {code}; see {self._folder / 'child.log'}"
                )

    def abandon(self) -> None:
        if self._child is None:
            return
        try:
            family = psutil.Process(self._child.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._child.kill()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def _write(self, line: dict[str, Any]) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.write(json.dumps(line) + "\n")
            self._child.stdin.flush()


def _environment(folder: Path) -> dict[str, str]:
    """wandb writes into the run directory only, and reports to nobody else."""
    places = {
        f"WANDB_{kind.upper()}_DIR": str((folder / kind).absolute()) for kind in ("cache", "data", "artifact")
    }
    return {**os.environ, **places, "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


def _run_id(file: Path) -> str:
    """One run directory is one run in wandb, also after a resume."""
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text()


def child() -> None:
    """Reads lines until the pipe closes. Whatever happens, this process is gone ORPHAN_S after that."""
    import wandb  # noqa: PLC0415 - only in the child: a second to import, and hooks into the interpreter

    try:
        run = wandb.init(
            **json.loads(sys.stdin.readline()),
            resume="allow",
            settings=wandb.Settings(console="off", x_disable_stats=True, disable_git=True),
        )
        for stage in ("sft", "reward_model", "rl"):
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        for line in sys.stdin:
            run.log(json.loads(line))
    finally:
        signal.alarm(ORPHAN_S)
    run.finish()


if __name__ == "__main__":
    child()
