"""What went wrong in a run and what was done about it, one record each: for the log, and for whoever checks
that a fault cost only what was promised."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "lost",  # a process died, or was ended because it stood still
    "recovered",  # its successor works
    "left the sync",  # an engine failed while weights travelled; the others went on without it
    "late answer",  # of a process that had been given up; dropped
    "replanned",  # samples that a lost engine had not finished are drawn again under their uids
    "rolled back",  # the trainers went back to a checkpoint
    "given up",  # the restarts of a process are spent
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Example: Incident(kind="lost", who="engine 1", pid=4711, detail="died in generate", seconds=0.0)."""

    kind: Kind
    who: str  # "actor rank 0", "engine 1"
    detail: str
    pid: int = 0  # of the process it happened to; 0 where none is meant
    seconds: float = 0.0  # from the loss to the recovery
    count: int = 1


Report = Callable[[Incident], None]


class RestartsSpent(RuntimeError):
    """A process was restarted as often as ``recovery`` allows and was lost again."""
