"""The start of a job as a timeline: allocated, head healthy, nodes joined, placement granted, first step.

The job writes one marker line per phase into its log (``mark``); ``Startup`` reads them back, whatever the
target. Every phase has a deadline, and its message says what to look at.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence

PREFIX = "[start] "
PHASES = {
    "allocated": "the target has not granted machines: look at its queue, or ask for less",
    "head healthy": "the Ray head does not answer: look at its log for the port or the token",
    "nodes joined": "nodes are missing: compare the roles that joined with those the run asks for",
    "placement groups ready": "devices are not granted: other jobs hold them, or a role asks for too much",
    "first step": "the roles start but no step ends: look at the log for the role that loads or compiles",
}

FIRST_STEP = r"^(?:\w+ )?step \d+/\d+()"  # of any stage, as launch/progress.py prints it


def mark(phase: str, detail: str = "") -> None:
    """Written by the job. Unknown phases are a programming error."""
    assert phase in PHASES, phase
    if "QUARTET_SUBMITTED" not in os.environ:  # set by enter.py: on a terminal of one's own nobody reads it
        return
    sys.stdout.write(f"{PREFIX}{phase}{': ' + detail if detail else ''}\n")
    sys.stdout.flush()


class Startup:
    """Fed with the log so far; answers with new lines, and with a complaint when a phase takes too long."""

    def __init__(self, *, deadline_s: float, now: float | None = None) -> None:
        self._deadline_s = deadline_s
        self._began = self._last = time.monotonic() if now is None else now
        self.reached: dict[str, float] = {}  # phase -> seconds since the submission

    def feed(self, log: str, *, now: float | None = None) -> Sequence[str]:
        """One line per phase that is reached with this log and was not before."""
        now = time.monotonic() if now is None else now
        lines = []
        for phase in PHASES:
            pattern = FIRST_STEP if phase == "first step" else rf"^{re.escape(PREFIX + phase)}(.*)$"
            found = re.search(pattern, log, re.MULTILINE)
            if found and phase not in self.reached:
                self.reached[phase] = now - self._began
                self._last = now
                lines.append(f"+{now - self._began:6.1f} s  {phase}{found[1]}")
        return lines

    def late(self, *, now: float | None = None) -> str | None:
        """The complaint about the first phase that is missing, None while there is time."""
        now = time.monotonic() if now is None else now
        order = list(PHASES)
        last = max((order.index(phase) for phase in self.reached), default=-1)
        missing = order[last + 1 :]
        if not missing or now - self._last <= self._deadline_s:
            return None
        return f"not {missing[0]} within start_deadline_s={self._deadline_s:g} s: {PHASES[missing[0]]}"
