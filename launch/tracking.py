"""Where metrics go: ``run_dir/metrics.jsonl`` always, Weights & Biases and TensorBoard beside it when asked
for.

Invariant: the file is the source of truth and is complete; the others may hang, raise or vanish at any moment
and the run neither stops nor waits for them.

Concurrency: ``log`` writes and flushes the line, then offers the record to each side-car (``sidecar.py``),
which never waits; ``close`` waits at most CLOSE_S for all side-cars together.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from launch.sidecar import Record, SideCar
from launch.wandb_sink import WandbSink
from orchestrator.config import Run

CLOSE_S = 5.0


class Tracker:
    """What the driver logs to. ``file`` and every side-car live as long as the run."""

    def __init__(self, file: Path, side_cars: Sequence[SideCar] = ()) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(file)
        self._file: IO[str] = file.open("a")
        self.side_cars = tuple(side_cars)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """One line, on disk when this returns to the extent that the operating system lives on."""
        values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"stage": stage, "step": step, "time": time.time(), **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for side_car in self.side_cars:
            side_car.offer(Record(stage=stage, step=step, values=values))

    def close(self, timeout_s: float = CLOSE_S) -> None:
        self._file.close()
        deadline = time.monotonic() + timeout_s
        for side_car in self.side_cars:
            side_car.end()
        for side_car in self.side_cars:
            side_car.join(deadline - time.monotonic())


class TensorBoardSink:
    """Event files in ``folder``, flushed at every record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None  # torch.utils.tensorboard.SummaryWriter, which has no types

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - only runs that ask for it load it

        self._writer = SummaryWriter(str(self._folder))

    def log(self, record: Record) -> None:
        for name, value in record.finite().items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """Its thread is a daemon and its files need no end."""


def open_tracker(run: Run) -> Tracker:
    """The sinks that the run asks for."""
    side_cars = []
    if run.tracking.tensorboard:
        side_cars.append(SideCar("tensorboard", TensorBoardSink(run.run_dir / "tensorboard")))
    if run.tracking.wandb != "disabled":
        side_cars.append(SideCar("wandb", WandbSink(run)))
    return Tracker(run.run_dir / "metrics.jsonl", side_cars)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """What a metrics.jsonl says of each stage and step, in one dict: a figure that was logged again, after a
    resume, counts once, the last."""
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for text in file.read_text().splitlines():
        line = json.loads(text)
        steps.setdefault((line["stage"], line["step"]), {}).update(line)
    return list(steps.values())


def cut_torn_line(file: Path) -> None:
    """A killed driver may leave half a line; what is appended after it would be lost with it."""
    if not file.exists():
        return
    text = file.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with file.open("r+b") as stream:
            stream.truncate(whole)
