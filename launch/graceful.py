"""SIGTERM in any stage: finish the step, write a checkpoint, end with 75 (EX_TEMPFAIL); a resume goes on.
A second SIGTERM ends the run at once.

The handler is installed after ``ray.init``, which replaces the ones that were there before.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

CHECKPOINTED = 75


class StoppedAfterCheckpoint(Exception):
    """Raised after the checkpoint is complete; the message says where it is."""


class StopRequest:
    """Set by the signal, read after each step."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        """The second time ends the process here and now: Ray ends what it had started."""
        if self.asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked = True


@contextmanager
def stop_on_sigterm(request: StopRequest) -> Iterator[None]:
    """Inside a running event loop: the first SIGTERM only sets the request."""
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, request.ask)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
