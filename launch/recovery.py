"""The rl stage goes on when its trainers are lost, and ends in order when restarts are spent.

Engines, reward and reference workers replace themselves behind their handles. Actor and critic are one
failure domain: they carry the state that is trained, and never go on from different steps. When a rank is
lost, its group is built anew, all trainers load the last checkpoint (or are built anew, where there is none),
and the steps since are done again with the same ledger: the same uids, seeds and, on CPUs, the same bits. The
driver and the engines stay.
"""

import json
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from actors.errors import WorkerLost
from launch.build import Crew
from launch.graceful import StoppedAfterCheckpoint
from orchestrator.durable import replace_durably
from orchestrator.incidents import Incident, RestartsSpent
from orchestrator.ledger import Settled


class Saving(Protocol):
    """What is needed of the stage's journal."""

    newest: Path | None

    async def save_now(self) -> None: ...


async def through_losses(go_on: Callable[[], Awaitable[None]], crew: Crew, journal: Saving) -> None:
    """``go_on`` restores the newest checkpoint and trains; it is called again after each loss of a trainer.
    Raises StoppedAfterCheckpoint when restarts are spent."""
    while True:
        try:
            return await go_on()
        except WorkerLost as lost:
            why = str(lost)
        except RestartsSpent as spent:
            with suppress(WorkerLost):  # a trainer is gone too: what is on disk counts
                await journal.save_now()
            raise StoppedAfterCheckpoint(f"{spent}; the last checkpoint is {journal.newest}") from spent
        try:
            await crew.rebuild_trainers(all_of_them=journal.newest is None)
        except RestartsSpent as spent:
            raise StoppedAfterCheckpoint(f"{spent}; the last checkpoint is {journal.newest}") from spent
        where = "the beginning" if journal.newest is None else str(journal.newest)
        crew.incidents(Incident(kind="rolled back", who="trainers", detail=f"to {where}: {why}"))


class TrainedLog:
    """trained.jsonl: {"step", "uids"} of every step that counts; a step that is done again is there once.

    A step counts once a checkpoint holds it. So the lines are written when one is: before it, so that no
    checkpoint knows more than the log, which a resume cuts to the checkpoint.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._coming: list[str] = []  # since the last checkpoint

    def add(self, step: int, history: Sequence[Settled]) -> None:
        """``history``: of the ledger, whose last entries are of this step."""
        last = takewhile(lambda settled: settled.step == step, reversed(history))
        uids = [settled.uid for settled in last][::-1]
        self._coming.append(json.dumps({"step": step, "uids": uids}) + "\n")

    def write(self) -> None:
        """What was added is on disk. OSError: the disk is full, and the next call writes it all."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab", buffering=0) as stream:
            before, left = stream.tell(), "".join(self._coming).encode()
            try:
                while left:
                    left = left[stream.write(left) :]
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(before)
                raise
        self._coming = []

    def cut(self, step: int) -> None:
        """Forgets what came after ``step``, and a line that was torn."""
        self._coming = []
        if not self._file.exists():
            return
        whole = [line for line in self._file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        replace_durably(self._file, "".join(f"{line}\n" for line in kept))
