"""A worker without a model, that another process can start in half a second: it imports no torch."""

import os
import time
from typing import ClassVar

from actors.vital_signs import ProcessGone, RosterLine, VitalSigns


class Slow(VitalSigns):
    """Answers after a while with its pid; ``spin`` works meanwhile, ``wait`` does not."""

    verbs: ClassVar[dict] = {}

    def describe(self) -> RosterLine:
        return RosterLine(role="slow", rank=0, pid=os.getpid(), node=os.uname().nodename)

    def rendezvous(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def setup(self, *settings) -> None:
        """Nothing to load."""

    def wait(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def spin(self, seconds: float) -> int:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            pass
        return os.getpid()

    def half_dead(self) -> None:
        raise ProcessGone("a child is gone")

    def close(self) -> None:
        """Nothing to end."""
