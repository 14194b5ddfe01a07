"""Where the seconds of a step went, measured around the handles so that the loop has no timers in it.

A span is one call of one role. Calls overlap (many ``generate`` at once; with staleness, across steps too),
so the seconds of a phase are the UNION of its spans within the step, and ``driver_s`` is the step's wall time
minus the union of all spans: what the driver spent while no role worked. A phase never exceeds the step;
phases may add up to more than the step when they overlap.

Example, a step from 0 to 10: generate [0, 4] and [1, 5], reward [4, 6], update [7, 9]

    seconds = {generate: 5, reward: 2, update: 2}     driver_s = 10 - |[0, 6] + [7, 9]| = 2

Concurrency: one event loop calls everything; nothing here is shared between threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from orchestrator import metrics
from orchestrator.intervals import Interval, length, union


class Phase(StrEnum):
    """What a span was for. The probe that proves a sync runs beside the generation that follows."""

    GENERATE = "generate"
    REWARD = "reward"
    SCORE = "score"
    UPDATE = "update"
    SYNC = "sync"
    PROBE = "probe"
    SAVE = "save"
    LOAD = "load"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    role: str
    phase: Phase
    start: float  # seconds of a monotonic clock
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """One step, in seconds."""

    start: float  # of the clock of the spans
    wall_s: float
    seconds: dict[Phase, float]  # only phases that happened
    driver_s: float

    @property
    def driver_fraction(self) -> float:
        return self.driver_s / self.wall_s if self.wall_s > 0 else 0.0

    def metrics(self) -> dict[str, float]:
        return {
            metrics.STEP_S: self.wall_s,
            metrics.DRIVER_S: self.driver_s,
            metrics.DRIVER_FRACTION: self.driver_fraction,
            **{metrics.SECONDS + phase: seconds for phase, seconds in self.seconds.items()},
        }


class Timeline:
    """Collects spans; ``end_step`` closes the books on everything since the last one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._done: list[Span] = []
        self._open: dict[object, Span] = {}  # calls in flight; their end is not known yet

    @contextmanager
    def span(self, role: str, phase: Phase) -> Iterator[None]:
        """Around one call. A call that fails or is cancelled took its time all the same."""
        key, start = object(), self._clock()
        self._open[key] = Span(role=role, phase=phase, start=start, end=start)
        try:
            yield
        finally:
            del self._open[key]
            self._done.append(Span(role=role, phase=phase, start=start, end=self._clock()))

    def end_step(self) -> StepTimes:
        """The times since the last call. A call in flight counts up to here; the rest of it counts in the
        next step."""
        start, end = self._start, self._clock()
        in_flight = [Span(role=s.role, phase=s.phase, start=s.start, end=end) for s in self._open.values()]
        times = step_times([*self._done, *in_flight], start, end)
        self._start, self._done = end, []
        return times


def step_times(spans: Iterable[Span], start: float, end: float) -> StepTimes:
    """The spans, cut to [start, end], as seconds per phase."""
    by_phase: dict[Phase, list[Interval]] = {}
    for span in spans:
        by_phase.setdefault(span.phase, []).append((max(span.start, start), min(span.end, end)))
    covered = union_s(interval for intervals in by_phase.values() for interval in intervals)
    return StepTimes(
        start=start,
        wall_s=end - start,
        seconds={phase: union_s(by_phase[phase]) for phase in Phase if phase in by_phase},
        driver_s=max(0.0, end - start - covered),
    )


def union_s(intervals: Iterable[Interval]) -> float:
    """Seconds covered by at least one interval: [0, 4] and [1, 5] cover 5. Empty and reversed ones cover
    nothing."""
    return length(union(intervals))
