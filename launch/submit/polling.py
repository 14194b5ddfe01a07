"""Waiting with a deadline."""

import time
from collections.abc import Callable

POLL_S = 0.2


def wait_until(ready: Callable[[], bool], seconds: float, why: str) -> None:
    """Returns when ``ready()`` is true; ValueError with ``why`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise ValueError(why)
        time.sleep(POLL_S)
