"""What a worker process says of itself: who it is, and while its main call runs, that it lives, that it gets
on, where it stands.

``pulse`` and ``stacks`` run in a thread of their own (Ray's concurrency group ``VITAL``), so they answer
while an update or a generation is under way. A stopped process answers nothing.
"""

import ctypes
import faulthandler
import os
import signal
import tempfile
import time
from dataclasses import dataclass

VITAL = "vital"  # name of the concurrency group
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
    stopped: tuple[int, ...] = ()


class VitalSigns:
    """Mixed into every worker class."""

    def pulse(self) -> Pulse:
        return Pulse(progress=time.process_time())

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
