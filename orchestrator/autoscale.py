"""How many engines there should be, from how long the trainers waited and how much the engines did.

    shares of a step --- median of `window` steps with the same engines ---> one more, one fewer, or neither

One more when the trainers wait longer than ``target_wait`` + TOLERANCE; one fewer when they would wait no
longer than ``target_wait`` even then. Between the two nothing happens, so what a change brings about is no
reason to take it back. Steps are counted and no clock is read. A run that is resumed measures anew.

Example, rl.staleness 1, target 0.1: generation takes 12 s on one engine, training 5 s.

    1 engine    12 s a step, wait (12 - 5) / 12 = 0.58                        -> 2
    2 engines    6 s, wait (6 - 5) / 6 = 0.17                                 -> 3
    3 engines    5 s, wait 0, busy 4 / 5; one fewer would wait 0.17 again     -> 3
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from orchestrator.config.autoscale import Autoscale

TOLERANCE = 0.05  # of a step; shares of quiet runs move by less from window to window


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Of the time of a step (``work.engine_shares``)."""

    wait: float  # some engine generates and no trainer works
    busy: float  # an engine generates; mean of the engines
    idle: float  # an engine does nothing; mean of the engines

    def one_engine_fewer(self, engines: int, *, overlaps: bool) -> float:
        """``wait`` when the others of ``engines`` do its work as well.

        They take ``busy`` / (engines - 1) longer, at most: a larger batch takes less than its part. Where
        generation ``overlaps`` training, their idle time comes first.
        """
        longer = self.busy / (engines - 1)
        if overlaps:
            longer = max(0.0, longer - self.idle)
        return (self.wait + longer) / (1 + longer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One engine more or fewer, and the medians it was judged by."""

    engines: int
    shares: Shares


class Autoscaler:
    """Judges step by step."""

    def __init__(self, settings: Autoscale, *, overlaps: bool) -> None:
        """``overlaps``: generation goes on while the trainers work (rl.staleness > 0)."""
        self._settings, self._overlaps = settings, overlaps
        self._engines: int | None = None  # at the end of the step before
        self._seen: deque[Shares] = deque(maxlen=settings.window)

    def stepped(self, engines: int | None, shares: Shares) -> Decision | None:
        """None: as it is. ``engines``: that serve; None while their number changes."""
        if engines is None or engines != self._engines:
            self._engines = engines
            self._seen.clear()  # this step began with another number
            return None
        self._seen.append(shares)
        if len(self._seen) < self._settings.window:
            return None
        medians = Shares(
            wait=median(s.wait for s in self._seen),
            busy=median(s.busy for s in self._seen),
            idle=median(s.idle for s in self._seen),
        )
        wanted = self._wanted(engines, medians)
        if wanted == engines:
            return None
        self._seen.clear()  # the next one is judged by other steps, also when this one is refused
        return Decision(engines=wanted, shares=medians)

    def _wanted(self, engines: int, shares: Shares) -> int:
        settings = self._settings
        if engines < settings.min:  # one has no restarts left
            return engines + 1
        if shares.wait > settings.target_wait + TOLERANCE:
            return max(engines, min(engines + 1, settings.max))
        if engines > settings.min:
            fewer = shares.one_engine_fewer(engines, overlaps=self._overlaps)
            return engines - 1 if fewer <= settings.target_wait else engines
        return engines
