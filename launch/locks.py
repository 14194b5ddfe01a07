"""Locks that end with the process that holds them: of a run's folder, of a submission's file."""

import fcntl
import os
from pathlib import Path


def lock_is_held(path: Path) -> bool:
    """Whether somebody holds the exclusive lock of this file or folder; False where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
