"""What every worker did and when, by the workers' own clocks, and what of a step's device time was of use.

A ``WorkSpan`` is one call inside one worker, so queues and the network are no part of it. Per step each
moment of each device (a seat; roles that share one count once) is given to the first cause that applies:

    useful          a worker of the device generates, rewards, scores or updates
    sync            else it sends or receives weights
    sleep           else a role gives its memory away or takes it back
    other           else it probes, saves or loads
    wait_generate   else nothing runs here, and somebody generates; wait_update, wait_score, wait_sync,
                    wait_other likewise, in this order
    driver          nobody in the whole run works: the true overhead of the driver

The shares add up to 1. Example, two devices, a step from 0 to 10: the engine generates [0, 6], the actor
updates [7, 9] and sends [9, 10] what the engine receives:

    useful = (6 + 2) / 20   sync = 2 / 20   wait_generate = 6 / 20   wait_update = 2 / 20   driver = 2 / 20
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orchestrator import metrics
from orchestrator.clocks import Clocks
from orchestrator.intervals import Interval, difference, intersection, length, union


class Work(StrEnum):
    """What a worker does in a call."""

    GENERATE = "generate"
    UPDATE = "update"
    REWARD = "reward"
    SCORE = "score"
    SEND = "send"
    RECEIVE = "receive"
    SLEEP = "sleep"
    PROBE = "probe"
    SAVE = "save"
    LOAD = "load"


DRIVER = "driver"
USEFUL = frozenset({Work.GENERATE, Work.UPDATE, Work.REWARD, Work.SCORE})
CAUSES: dict[str, frozenset[Work]] = {  # of work; the order decides what a waiting device waits for
    "generate": frozenset({Work.GENERATE}),
    "update": frozenset({Work.UPDATE}),
    "score": frozenset({Work.REWARD, Work.SCORE}),
    "sync": frozenset({Work.SEND, Work.RECEIVE}),
    "sleep": frozenset({Work.SLEEP}),
    "other": frozenset({Work.PROBE, Work.SAVE, Work.LOAD}),
}
# What hides the other when a worker does two things: requests under way stand still while weights arrive.
FIRST = (Work.RECEIVE, Work.SEND, Work.SLEEP)
ON_TOP = (*FIRST, *(work for work in Work if work not in FIRST))
TRAINERS = ("actor", "critic")
HIDDEN_ROLES = ("reward", "reference")  # their work can hide behind generation at any staleness


@dataclass(frozen=True, slots=True, kw_only=True)
class Seated:
    """A worker and where it sits: Seated(worker="actor rank 0", device="1.0")."""

    worker: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkSpan:
    seat: Seated
    work: Work
    start: float  # seconds of the driver's monotonic clock
    end: float


@dataclass(frozen=True, slots=True)
class Recorded:
    """An answer on its way to the driver, with its times by the worker's clock."""

    answer: Any
    begin: float
    end: float
    clock: str


class WorkBook:
    """Collects the spans of a run. One event loop writes into it; a call in flight has no end yet and counts
    from when it was sent."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, clocks: Clocks | None = None) -> None:
        self.clock, self.clocks = clock, clocks or Clocks()
        self.seats: list[Seated] = []  # of the workers that are there
        self._done: list[WorkSpan] = []
        self._open: dict[object, WorkSpan] = {}

    def enter(self, worker: str, device: str, verbs: Mapping[str, Work]) -> WorkLog:
        """A worker starts; one of the same name that was there before is gone."""
        seat = Seated(worker=worker, device=device)
        self.seats = [known for known in self.seats if known.worker != worker] + [seat]
        return WorkLog(self, seat, verbs)

    def leave(self, worker: str | None = None) -> None:
        """All workers have ended; or this one, while the others work on."""
        self.seats = [seat for seat in self.seats if worker is not None and seat.worker != worker]

    def take(self) -> tuple[list[WorkSpan], list[WorkSpan]]:
        """The spans that ended since the last call, and those in flight, which end now."""
        done, self._done = self._done, []
        now = self.clock()
        return done, [WorkSpan(seat=s.seat, work=s.work, start=s.start, end=now) for s in self._open.values()]


@dataclass(frozen=True, slots=True)
class WorkLog:
    """One worker's pages."""

    book: WorkBook
    seat: Seated
    verbs: Mapping[str, Work]  # by the method that Ray calls; others are no work

    @contextmanager
    def call(self, verb: str) -> Iterator[Callable[[Any], Any]]:
        """Around one call; what it gives takes the times off the worker's answer."""
        book, work, key = self.book, self.verbs.get(verb), object()
        sent = book.clock()
        if work is not None:
            book._open[key] = WorkSpan(seat=self.seat, work=work, start=sent, end=sent)

        def unpack(answer: Any) -> Any:
            if not isinstance(answer, Recorded):
                return answer
            begin, end, clock = answer.begin, answer.end, answer.clock
            book.clocks.observe(clock, sent=sent, begin=begin, end=end, received=book.clock())
            offset = book.clocks.offset(clock)
            if work is not None:
                book._done.append(WorkSpan(seat=self.seat, work=work, start=begin - offset, end=end - offset))
            return answer.answer

        try:
            yield unpack
        finally:
            book._open.pop(key, None)


def row(spans: Sequence[WorkSpan]) -> list[tuple[Work, list[Interval]]]:
    """One worker's work as intervals that do not overlap: of two at once, the first of ``ON_TOP``."""
    taken: list[Interval] = []
    shown: list[tuple[Work, list[Interval]]] = []
    for work in ON_TOP:
        if moments := union((s.start, s.end) for s in spans if s.work is work):
            shown.append((work, difference(moments, taken)))
            taken = union([*taken, *moments])
    return shown


def flat(spans: Sequence[WorkSpan]) -> list[WorkSpan]:
    """The same work, each worker doing one thing at a time."""
    by_seat: dict[Seated, list[WorkSpan]] = {}
    for span in spans:
        by_seat.setdefault(span.seat, []).append(span)
    return [
        WorkSpan(seat=seat, work=work, start=start, end=end)
        for seat, own in by_seat.items()
        for work, moments in row(own)
        for start, end in moments
    ]


def covered(spans: Iterable[WorkSpan], works: Iterable[Work], start: float, end: float) -> list[Interval]:
    """When at least one span of these kinds was under way within [start, end]."""
    wanted = frozenset(works)
    return union((max(s.start, start), min(s.end, end)) for s in spans if s.work in wanted)


def device_shares(
    spans: Sequence[WorkSpan], seats: Sequence[Seated], start: float, end: float
) -> dict[str, float]:
    """Share of the time of all devices by cause, as in the module's docstring; they add up to 1."""
    devices = sorted({seat.device for seat in seats} | {span.seat.device for span in spans})
    total = (end - start) * len(devices)
    if total <= 0:
        return {}
    anywhere = {cause: covered(spans, works, start, end) for cause, works in CAUSES.items()}
    seconds: dict[str, float] = {"useful": 0.0}
    for device in devices:
        here = [span for span in spans if span.seat.device == device]
        left: list[Interval] = [(start, end)]
        claims = [("useful", covered(here, USEFUL, start, end))]
        claims += [(cause, covered(here, CAUSES[cause], start, end)) for cause in ("sync", "sleep", "other")]
        claims += [(f"wait_{cause}", moments) for cause, moments in anywhere.items()]
        for cause, moments in claims:
            seconds[cause] = seconds.get(cause, 0.0) + length(intersection(left, moments))
            left = difference(left, moments)
        seconds[DRIVER] = seconds.get(DRIVER, 0.0) + length(left)
    return {cause: amount / total for cause, amount in seconds.items() if amount > 0 or cause == "useful"}


def hidden_share(spans: Sequence[WorkSpan], start: float, end: float) -> float | None:
    """Of the time that reward and reference workers worked, the share in which somebody generated; None when
    they scored nothing, or nobody generated."""
    generating = covered(spans, {Work.GENERATE}, start, end)
    if not generating:
        return None
    worked = hidden = 0.0
    for worker in {s.seat.worker for s in spans if s.seat.worker.startswith(HIDDEN_ROLES)}:
        own = covered([s for s in spans if s.seat.worker == worker], CAUSES["score"], start, end)
        worked += length(own)
        hidden += length(intersection(own, generating))
    return hidden / worked if worked else None


def engine_shares(
    spans: Sequence[WorkSpan], seats: Sequence[Seated], start: float, end: float
) -> dict[str, float]:
    """What ``autoscale.py`` weighs, as shares of a step; nothing of a stage without engines.

    Example, the step above: the engine generates for 6 s and receives for 1 of 10, and meanwhile the actor
    does nothing for 6: trainer_wait 0.6, engine_busy 0.6, engine_idle 0.3.
    """
    engines = [seat for seat in seats if seat.worker.startswith("engine")]
    if not engines or end <= start:
        return {}
    training = covered([s for s in spans if s.seat.worker.startswith(TRAINERS)], Work, start, end)
    waited = difference(covered(spans, {Work.GENERATE}, start, end), training)
    own = [[span for span in spans if span.seat == seat] for seat in engines]
    total = (end - start) * len(engines)
    busy = sum(length(covered(work, {Work.GENERATE}, start, end)) for work in own)
    worked = sum(length(covered(work, Work, start, end)) for work in own)
    return {
        metrics.TRAINER_WAIT: length(waited) / (end - start),
        metrics.ENGINE_BUSY: busy / total,
        metrics.ENGINE_IDLE: 1 - worked / total,
    }


def work_metrics(
    spans: Sequence[WorkSpan], seats: Sequence[Seated], start: float, end: float
) -> dict[str, float]:
    """The figures of one step, for the log."""
    spans = flat(spans)
    idle = (end - start) - length(covered(spans, Work, start, end))
    hidden = hidden_share(spans, start, end)
    return {
        metrics.OVERHEAD_S: idle,
        metrics.OVERHEAD_FRACTION: idle / (end - start) if end > start else 0.0,
        **({} if hidden is None else {metrics.SCORING_HIDDEN: hidden}),
        **engine_shares(spans, seats, start, end),
        **{metrics.DEVICE + cause: share for cause, share in device_shares(spans, seats, start, end).items()},
    }
