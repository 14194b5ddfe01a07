"""What the workers of a stage have in common: who is told of their losses, where their stacks are written."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from actors.errors import LESS_MEMORY
from actors.vital_signs import RosterLine, VitalSigns
from orchestrator.incidents import Report
from orchestrator.work import WorkBook

STACKS_S = 2.0  # for which a process is waited for that may be stopped
KERNEL_COUNTERS = Path("/proc/vmstat")


def oom_kills() -> int:
    """How many processes of this machine the kernel's OOM killer has ended; 0 where it does not say."""
    lines = KERNEL_COUNTERS.read_text().splitlines() if KERNEL_COUNTERS.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


class Watched(Protocol):
    """A ``RemoteWorker``."""

    @property
    def name(self) -> str: ...
    async def stacks(self, limit_s: float) -> str: ...


class Ward:
    """The workers of a stage, those who look after them, and where their stacks are written."""

    def __init__(
        self,
        folder: Path,
        report: Report,
        record: Callable[[Sequence[RosterLine]], None],
        book: WorkBook,
    ) -> None:
        """``folder``: for stacks; ``record``: into the roster; ``book``: what each worker does when."""
        self.report, self.record, self.book, self._folder = report, record, book, folder
        self.workers: list[Watched] = []
        self._oom_kills = oom_kills()

    def memory_hint(self) -> str:
        """For the loss of a process: whether the kernel took memory back since the loss before. It does not
        say whose, and only this machine is asked."""
        before, self._oom_kills = self._oom_kills, oom_kills()
        number = self._oom_kills - before
        hint = f"; the kernel's OOM killer ended {number} processes of this machine since the last loss"
        return f"{hint}: {LESS_MEMORY}" if number else ""

    async def write_stacks(self, why: str) -> Path:
        """One file with the stacks of every thread of the driver and of all workers that answer."""
        texts = await asyncio.gather(*(worker.stacks(STACKS_S) for worker in self.workers))
        parts = [f"{why}\n", f"\n== driver (pid {os.getpid()})\n{VitalSigns().stacks()}"]
        parts += [f"\n== {w.name}\n{text}" for w, text in zip(self.workers, texts, strict=True)]
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{len(list(self._folder.iterdir())):04d}.txt"
        path.write_text("".join(parts))
        return path
