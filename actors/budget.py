"""How often a process may be restarted: rare losses never end a run, a crash loop does."""

import time
from collections import deque

HOUR_S = 3600.0


class Budget:
    """At most ``restarts`` within any hour."""

    def __init__(self, restarts: int) -> None:
        self._restarts = restarts
        self._taken: deque[float] = deque()

    def take(self) -> bool:
        """Whether there is one left; it is then used."""
        now = time.monotonic()
        while self._taken and now - self._taken[0] > HOUR_S:
            self._taken.popleft()
        if len(self._taken) >= self._restarts:
            return False
        self._taken.append(now)
        return True
