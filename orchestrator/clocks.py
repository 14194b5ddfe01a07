"""What time it is on another host, from the calls that are made anyway.

A worker says when a call began and ended by its own monotonic clock, the driver when it sent the call and
when the answer came. No call begins before it is sent or is answered before it ends, so with o = worker's
clock minus driver's

    end - received  <=  o  <=  begin - sent

and each call narrows the interval. The estimate is its middle, wrong by at most half its width: about the
latency of the quickest call. Only the last calls count, for clocks drift by up to 50 microseconds a second.

Example: sent at 10, received at 14 here; begun at 103, ended at 105 there: 91 <= o <= 93, so o = 92 +- 1.
"""

from __future__ import annotations

import socket
from collections import deque
from pathlib import Path

CALLS = 256  # of a host that count

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def clock_name() -> str:
    """Processes with the same name read the same monotonic clock: it counts from the boot of the kernel."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()


class Clocks:
    """Offsets of the clocks of other hosts from this process's."""

    def __init__(self, own: str | None = None) -> None:
        self._own = own or clock_name()
        self._bounds: dict[str, deque[tuple[float, float]]] = {}

    def observe(self, clock: str, *, sent: float, begin: float, end: float, received: float) -> None:
        if clock != self._own:
            self._bounds.setdefault(clock, deque(maxlen=CALLS)).append((end - received, begin - sent))

    def offset(self, clock: str) -> float:
        """Seconds to subtract from a time of that clock; 0 for our own."""
        low, high = self._interval(clock)
        return (low + high) / 2

    def error(self, clock: str) -> float:
        """The offset is right to this many seconds, as far as the clocks ran alike; 0 for our own."""
        low, high = self._interval(clock)
        return abs(high - low) / 2

    def _interval(self, clock: str) -> tuple[float, float]:
        bounds = self._bounds.get(clock)
        if clock == self._own or not bounds:
            return 0.0, 0.0
        return max(low for low, _ in bounds), min(high for _, high in bounds)
