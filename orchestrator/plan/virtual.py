"""Virtual time: an asyncio event loop whose clock jumps to the next timer, and places that share out device
time in it. Hours of a schedule pass in milliseconds, in the order in which they would have."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
TINY = 1e-9  # seconds: rounding of the shares of a place


class _Jump(selectors.DefaultSelector):
    """Waits for nothing: time passes at once. Nothing outside ever answers, so waiting without a timer is for
    ever."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulated schedule waits for something that never comes")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)
        self._clock_resolution = 1e-9  # of asyncio's own: timers this close are due

    def time(self) -> float:
        return self._jump.now


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """One piece of work at a place."""

    phase: str
    start: float
    end: float
    demand: float


@dataclass(slots=True)
class _Job:
    left: float  # seconds at full speed
    demand: float
    done: asyncio.Future[None]


class Place:
    """A device, or the cores of a node: work at the same time shares ``capacity`` fairly.

    Example: capacity 1, two pieces of 1 s that start together both end after 2 s.
    """

    def __init__(self, name: str, capacity: float = 1.0) -> None:
        self.name, self.capacity = name, capacity
        self.history: list[Busy] = []
        self._jobs: list[_Job] = []
        self._at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def work(self, seconds: float, phase: str, demand: float = 1.0) -> None:
        """Returns when ``seconds`` of full speed have been worked off; ``demand`` of the capacity at most."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        if seconds > 0:
            self._advance()
            job = _Job(seconds, demand, loop.create_future())
            self._jobs.append(job)
            self._schedule()
            await job.done
        self.history.append(Busy(phase=phase, start=start, end=loop.time(), demand=demand))

    def _rate(self) -> float:
        return min(1.0, self.capacity / max(1e-12, sum(job.demand for job in self._jobs)))

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        passed, self._at = (now - self._at) * self._rate(), now
        for job in self._jobs:
            job.left -= passed

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._jobs:
            wait = max(0.0, min(job.left for job in self._jobs)) / self._rate()
            self._timer = asyncio.get_running_loop().call_later(wait, self._finish)

    def _finish(self) -> None:
        self._timer = None
        self._advance()
        ended = [job for job in self._jobs if job.left <= TINY]
        self._jobs = [job for job in self._jobs if job.left > TINY]
        for job in ended:
            if not job.done.done():
                job.done.set_result(None)
        self._schedule()
