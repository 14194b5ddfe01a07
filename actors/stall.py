"""For how long a worker has had something to do, and a core to do it on, and has not done it."""

import time
from collections.abc import Callable

from actors.vital_signs import Pulse

IDLE_SHARE = 0.02  # of a core; what a process uses that only waits
IDLE_S = 0.1


class StallClock:
    """Of one worker; told of each pulse. Time for which it waited for a core does not count: a machine with
    too much to do is no fault of its own. Nor does time for which nobody looked."""

    def __init__(self, silence_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A worker without a pulse for ``silence_s`` would have been ended: the driver stood still."""
        self._silence_s, self._clock = silence_s, clock
        self._since = self._looked_at = clock()
        self._last = Pulse(progress=0.0)  # when it last got on

    def stalled_s(self, pulse: Pulse, *, busy: bool) -> float:
        """``busy``: it has been asked something and has not answered."""
        now = self._clock()
        unseen, self._looked_at = now - self._looked_at, now
        stalled = now - self._since - self._starved_s(pulse)
        done = pulse.progress - self._last.progress
        # A sum of processor times falls when it is of other processes than before.
        worked = done < 0 or done >= IDLE_SHARE * stalled + IDLE_S
        if worked or pulse.held or not busy or unseen > self._silence_s:
            self._since, self._last = now, pulse
            return 0.0
        return stalled

    def _starved_s(self, pulse: Pulse) -> float:
        """Of the thread that got no core for longest: which of them has the work nobody knows."""
        before = self._last.waited
        return max((waited - before.get(thread, 0.0) for thread, waited in pulse.waited.items()), default=0.0)
