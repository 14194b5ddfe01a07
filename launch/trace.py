"""trace.json of a run: a row per worker and one for the steps, in the format of Chrome, which Perfetto reads.

Written step by step; the file is whole and valid JSON after every write. Times are microseconds since the
first event of the run. A driver that resumes a run goes on behind the last event, as another process of the
trace. Example of a line:

    {"name": "update", "ph": "X", "pid": 1, "tid": 3, "ts": 1200000, "dur": 350000, "args": {"stage": "rl"}},
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator.intervals import Interval, difference, intersection, union
from orchestrator.work import (
    CAUSES,
    DRIVER,
    Seated,
    Work,
    WorkBook,
    WorkSpan,
    covered,
    flat,
    row,
    work_metrics,
)

Event = dict[str, Any]
STEPS = "steps"  # the first row
TAIL = b"\n]\n"
REMEMBERED = 64  # intervals of a worker that may overlap what is still to come


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step that is over."""

    stage: str
    number: int
    start: float
    end: float
    figures: dict[str, float]


class RunTrace:
    """The work of a run's workers, as figures per step and as a file."""

    def __init__(self, path: Path | None) -> None:
        """``path`` None: no file; the figures all the same."""
        self.book = WorkBook()
        self._file = None if path is None else TraceFile(path)
        self._zero: float | None = None  # of this driver's part of the trace, on the clock of the book
        self._kept: list[WorkSpan] = []  # of earlier steps that reach into this one
        self._written: dict[str, list[Interval]] = {}  # by worker

    def step(self, stage: str, step: int, start: float, end: float) -> dict[str, float]:
        """The figures of a step that is over. Calls in flight count from when they were sent; in the file
        they stand when they have ended, with their own times."""
        done, in_flight = self.book.take()
        figures = work_metrics([*self._kept, *done, *in_flight], self.book.seats, start, end)
        self._kept = [span for span in done if span.end > end]
        over = Step(stage=stage, number=step, start=start, end=end, figures=figures)
        self._write(done, stage, over, in_flight)
        return figures

    def write_rest(self) -> None:
        """What is left of a stage, when its workers have ended."""
        self._write(self.book.take()[0], "", None, [])
        self._kept = []
        self.book.leave()

    def close(self) -> None:
        if self._file is not None:
            self.write_rest()
            self._file.close()

    def _write(
        self, spans: Sequence[WorkSpan], stage: str, step: Step | None, in_flight: Sequence[WorkSpan]
    ) -> None:
        if self._file is None:
            return
        begins = [span.start for span in spans] + ([step.start] if step else [])
        if not begins:
            return
        if self._zero is None:
            self._zero = min(begins)
        events = []
        if step:
            args = {name: round(value, 4) for name, value in step.figures.items()}
            events.append(self._event(STEPS, f"{stage} step {step.number}", (step.start, step.end), args))
        for worker in dict.fromkeys(span.seat.worker for span in spans):
            written = self._written.get(worker, [])
            for work, moments in row([span for span in spans if span.seat.worker == worker]):
                new = difference(moments, written)
                events += [self._event(worker, work, interval, {"stage": stage}) for interval in new]
                written = union([*written, *new])
            self._written[worker] = written[-REMEMBERED:]
        if step:
            for worker, cause, interval in waits(
                flat([*spans, *in_flight]), self.book.seats, step.start, step.end
            ):
                events.append(self._event(worker, "wait", interval, {"for": cause, "stage": stage}))
        self._file.write(events)

    def _event(self, row_name: str, name: str, interval: Interval, args: Mapping[str, Any]) -> Event:
        assert self._file is not None and self._zero is not None
        start, end = (round((moment - self._zero) * 1e6) for moment in interval)
        tid = self._file.tid(row_name)
        return {"name": name, "ph": "X", "tid": tid, "ts": start, "dur": end - start, "args": dict(args)}


def waits(
    spans: Sequence[WorkSpan], seats: Sequence[Seated], start: float, end: float
) -> Iterable[tuple[str, str, Interval]]:
    """(worker, what for, when) of every wait within a step; the causes and their order are those of
    ``work.device_shares``."""
    for seat in seats:
        left = difference([(start, end)], covered([s for s in spans if s.seat == seat], Work, start, end))
        for cause, works in CAUSES.items():
            moments = covered(spans, works, start, end)
            yield from ((seat.worker, cause, interval) for interval in intersection(left, moments))
            left = difference(left, moments)
        yield from ((seat.worker, DRIVER, interval) for interval in left)


class TraceFile:
    """Appends events; a file that a killed driver left torn is cut to its whole lines first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._tids: dict[str, int] = {}
        self._pid, self._behind = 1, 0  # microseconds

    def tid(self, name: str) -> int:
        """Of the row of this name; a new one when there is none."""
        return self._tids.setdefault(name, len(self._tids))

    def write(self, events: Sequence[Event]) -> None:
        if not events:
            return
        if self._file is None:
            self._file = self._opened()
        named = [name for name in self._tids if name not in self._named]
        self._named.update(named)
        lines = [self._meta("thread_name", name, {"name": name}) for name in named]
        lines += [self._meta("thread_sort_index", name, {"sort_index": self._tids[name]}) for name in named]
        lines += [{**event, "pid": self._pid, "ts": event["ts"] + self._behind} for event in events]
        text = ",\n".join(json.dumps(line) for line in lines).encode()
        self._file.seek(-len(TAIL), os.SEEK_END)
        self._file.write((b",\n" if self._file.tell() > 1 else b"\n") + text + TAIL)
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _meta(self, name: str, row_name: str, args: Event) -> Event:
        return {"name": name, "ph": "M", "pid": self._pid, "tid": self._tids[row_name], "args": args}

    def _opened(self) -> IO[bytes]:
        self._named: set[str] = set()
        before = read_trace(self._path) if self._path.exists() else []
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._pid = 1 + max((event["pid"] for event in before), default=0)
        self._behind = max((event["ts"] + event["dur"] for event in before if event["ph"] == "X"), default=0)
        text = ",\n".join(json.dumps(event) for event in before).encode()
        self._path.write_bytes(b"[" + (b"\n" + text if before else b"") + TAIL)
        return self._path.open("r+b")


def read_trace(path: Path) -> list[Event]:
    """The events of a trace.json; a torn last line is left out."""
    events = []
    for line in path.read_text(errors="replace").splitlines():
        text = line.strip().rstrip(",")
        if text in ("", "[", "]"):
            continue
        try:
            events.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return events
