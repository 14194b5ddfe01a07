"""Where the processes of one engine meet: a folder of sockets that does not outlive them for long.

vLLM puts its sockets into the system's temporary folder, and a killed process leaves them there. In a folder
of their own, locked as long as the engine lives, they are known as left over: the next engine on the machine
removes them, and so does the run's end.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

PREFIX, UNBORN, LOCK = "quartet-", ".quartet-", "alive"
# Linux' limit for a socket's path, less our name and vLLM's.
LONGEST = 107 - len(f"/{PREFIX}01234567") - len("/00000000-0000-0000-0000-000000000000")

_own: dict[Path, IO[str]] = {}  # the lock of each folder, held until this process ends


def socket_folder() -> dict[str, str]:
    """Makes one for this process; for its environment before vLLM is imported. Empty where the temporary
    folder's path leaves no room: vLLM then uses that folder itself."""
    remove_dead_folders()
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST:
        return {}
    folder = Path(tempfile.mkdtemp(prefix=UNBORN))  # nobody looks at it before it is locked
    lock = (folder / LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = folder.rename(folder.with_name(PREFIX + folder.name.removeprefix(UNBORN)))
    _own[folder] = lock
    return {"VLLM_RPC_BASE_PATH": str(folder)}


def remove_own_folder() -> None:
    """After vLLM has ended."""
    for folder in _own:
        shutil.rmtree(folder, ignore_errors=True)


def dead_folders() -> list[Path]:
    """On this machine, of engines that are gone."""
    locks = Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}")
    return [lock.parent for lock in locks if _is_free(lock)]


def remove_dead_folders() -> None:
    for folder in dead_folders():
        shutil.rmtree(folder, ignore_errors=True)


def _is_free(lock: Path) -> bool:
    with suppress(OSError), lock.open() as file:  # another user's, or removed meanwhile
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
