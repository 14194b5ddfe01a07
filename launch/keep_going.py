"""``quartet train --supervise``: starts the run again from its last checkpoint whenever the driver dies.

The driver is a process of its own, so that a crash, a kill or the OOM killer ends it and not this one, which
imports neither torch nor ray. Signals go on to the driver; a run that was asked to stop is not started again.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from actors.budget import Budget
from launch.graceful import CHECKPOINTED

REFUSED = 2  # the run is wrong: another start would be refused as well
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


def main(words: Sequence[str], options: Sequence[str], *, restarts: int) -> int:
    """``options`` of the first start; later ones resume. The exit status is the last driver's; 128 + n after
    signal n."""
    command = [sys.executable, "-m", "launch.cli", "train", *words]
    first = [f"--{option}" for option in options]
    return supervise(command, first, ["--resume"], restarts=restarts)


def supervise(command: Sequence[str], first: Sequence[str], later: Sequence[str], *, restarts: int) -> int:
    budget, pause, asked = Budget(restarts), FIRST_PAUSE_S, []
    driver: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if driver is not None:
            driver.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    extra = first
    while True:
        began = time.monotonic()
        driver = subprocess.Popen([*command, *extra])
        code = driver.wait()
        status = code if code >= 0 else 128 - code
        if code in (0, REFUSED) or asked:
            return status
        if time.monotonic() - began > LONGEST_PAUSE_S:
            pause = FIRST_PAUSE_S
        how = f"signal {-code}" if code < 0 else f"status {code}"
        what = "wrote a checkpoint and ended" if code == CHECKPOINTED else f"ended with {how}"
        if not budget.take():
            _say(f"the driver {what}; recovery.restarts={restarts} within an hour are spent")
            return status
        _say(f"the driver {what}; it starts again from its last checkpoint in {pause:g} s")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
        extra = later


def _say(text: str) -> None:
    sys.stderr.write(f"quartet: {text}\n")
