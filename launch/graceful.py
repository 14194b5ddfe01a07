"""SIGTERM in any stage: finish the step, write a checkpoint, end with 75 (EX_TEMPFAIL); a resume goes on.

The handler is installed after ``ray.init``, which replaces the ones that were there before.
"""

import asyncio
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
        self.asked = True


@contextmanager
def stop_on_sigterm(request: StopRequest) -> Iterator[None]:
    """Inside a running event loop: SIGTERM only sets the request."""
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, request.ask)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
