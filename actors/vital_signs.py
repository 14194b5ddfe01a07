"""What a worker process says of itself: who it is, and while its main call runs, that it lives, that it gets
on, where it stands.

``pulse`` and ``stacks`` run in a thread of their own (Ray's concurrency group ``VITAL``), so they answer
while an update or a generation is under way. A stopped process answers nothing.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

VITAL = "vital"  # name of the concurrency group
PROMPT_S = 5e-5  # the switch interval while a pulse reads
_PR_SET_PDEATHSIG = 1


class ProcessGone(RuntimeError):
    """A process that this worker cannot do without has ended or stands still; only a restart helps."""


class NoWeights(RuntimeError):
    """The engine holds half an update and serves nobody until a whole one has arrived."""


class PolicyMovedOn(RuntimeError):
    """The weights of the version that was asked for are no more: the policy has been trained since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterLine:
    """One process of the run, for roster.json; ``incarnation`` counts those that held this role and rank."""

    role: str
    rank: int
    pid: int
    node: str
    incarnation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """``progress`` grows while the process works; ``stopped`` are pids that the kernel holds."""

    progress: float  # seconds of processor time, of this process or of those that work for it
    waited: Mapping[int, float] = field(default_factory=dict)  # seconds for which each thread got no core
    held: bool = False  # the driver keeps it waiting: it need not get on
    stopped: tuple[int, ...] = ()


def core_waits(pid: int) -> dict[int, float]:
    """Seconds for which each thread of a process has waited for a core, since its start, by its id; empty
    where the kernel keeps no count (it is in nanoseconds in /proc/PID/task/TID/schedstat)."""
    waits: dict[int, float] = {}
    with prompt_turns():
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):  # the thread has ended
                waits[int(file.parent.name)] = int(file.read_text().split()[1]) / 1e9
    return waits


@contextmanager
def prompt_turns() -> Iterator[None]:
    """For a hundred small reads beside Python that works: each gives the interpreter away, and a thread that
    works keeps it for the switch interval, 5 ms, so that they would take half a second."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(PROMPT_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


class VitalSigns:
    """Mixed into every worker class."""

    def pulse(self) -> Pulse:
        return Pulse(progress=time.process_time(), waited=core_waits(os.getpid()))

    def stacks(self) -> str:
        """The Python stack of every thread."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()


def die_with_parent() -> None:
    """For children that somebody else starts: the kernel ends them with the process that started them."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it was faster
        os.kill(os.getpid(), signal.SIGKILL)
