"""Keeps one job on this machine: runs it, passes signals on, writes its exit code down.

    python -m launch.submit.supervise FOLDER -- COMMAND ...

FOLDER/lock is held while the job lives, so that "running" cannot be a stale pid; FOLDER/exit_code appears
when it has ended; FOLDER/log holds what it said.
"""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from orchestrator.durable import write_durably


def main() -> int:
    folder, command = Path(sys.argv[1]), sys.argv[3:]
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    job: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if job is not None:
            job.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    with open(folder / "log", "ab", buffering=0) as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        (folder / "pid").write_text(f"{os.getpid()} {job.pid}")
        code = job.wait()
    write_durably(folder / "exit_code", str(code if code >= 0 else 128 - code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
