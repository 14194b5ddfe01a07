"""Roles that share their devices with the engine take turns on them: while one side works, the other sleeps.

    SAMPLE   the engine is awake whole; the others sleep
    TRAIN    the others are awake whole; the engine sleeps
    SYNC     only the weights of actor and engine are there: no optimizer, no KV cache

A verb that finds its turn enters at once; one that does not waits until the last verb of the present turn has
been answered, and then moves everybody. So the loop knows nothing of it, and a step changes turns three
times: when the last response is sampled, when the last learner has stepped, when the weights have arrived.
Roles with devices of their own are not in here.

A fleet of engines takes its turns by itself, one for each question to an engine: who waits for the successor
of a lost engine must not hold the devices on which it starts (SAMPLE) and gets its weights (SYNC).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from enum import Enum, auto
from typing import Any

from orchestrator.roles import Residency, Resident, Roles


class Turn(Enum):
    SAMPLE = auto()
    TRAIN = auto()
    SYNC = auto()


TakeTurn = Callable[[Turn], AbstractAsyncContextManager[None]]

ENGINE_VERBS = {"generate": Turn.SAMPLE, "logprobs": Turn.SAMPLE} | dict.fromkeys(
    ("prepare_weights", "commit_weights"), Turn.SYNC
)
MODEL_VERBS = dict.fromkeys(
    ("score", "score_rollouts", "distributions", "update", "save", "load", "export", "export_average"),
    Turn.TRAIN,
) | {"send_weights": Turn.SYNC, "logprobs": Turn.SYNC}  # the actor's: forward needs the weights alone


def residency(role: str, turn: Turn) -> Residency:
    """What of a role is on the shared devices in a turn."""
    if turn is Turn.SYNC:
        return Residency.WEIGHTS if role in {"actor", "engine"} else Residency.ASLEEP
    return Residency.AWAKE if (role == "engine") is (turn is Turn.SAMPLE) else Residency.ASLEEP


def taking_turns(roles: Roles, names: frozenset[str], turns: "Turns | None" = None) -> Roles:
    """The same roles; those of ``names`` share the engine's devices with it and take turns. ``turns``: those
    that the engine takes by itself; None: it knows of none."""
    residents: dict[str, Any] = {name: role for name, role in roles.all() if name in names}
    gated = {name: ENGINE_VERBS if name == "engine" else MODEL_VERBS for name in residents}
    if turns is not None:
        gated.pop("engine", None)
    turns = turns or Turns()
    turns.admit(residents)
    return replace(roles, **{name: InTurn(residents[name], turns, verbs) for name, verbs in gated.items()})


@asynccontextmanager
async def at_any_time(turn: Turn) -> AsyncIterator[None]:
    """The turn of who has devices of its own."""
    yield


class Turns:
    """Who has the devices. Nobody's verb runs while they change hands."""

    def __init__(self) -> None:
        self._residents: Mapping[str, Resident] = {}
        self._level: dict[str, Residency] = {}
        self._turn: Turn | None = None
        self._running = 0
        self._changed = asyncio.Condition()

    def admit(self, residents: Mapping[str, Resident]) -> None:
        """All of them awake, as they are when they have started."""
        self._residents = residents
        self._level = dict.fromkeys(residents, Residency.AWAKE)

    @asynccontextmanager
    async def turn(self, turn: Turn) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._turn is turn or not self._running)
            if self._turn is not turn:
                self._turn = None  # what an error leaves: the next verb moves everybody again
                await self._move(turn)
                self._turn = turn
            self._running += 1
        try:
            yield
        finally:
            async with self._changed:
                self._running -= 1
                self._changed.notify_all()

    async def _move(self, turn: Turn) -> None:
        """First all that leave, then all that come: the devices need not hold both."""
        to = {name: residency(name, turn) for name in self._residents}
        leaving = [name for name in to if to[name] < self._level[name]]
        coming = [name for name in to if to[name] > self._level[name]]
        for names in (leaving, coming):
            await asyncio.gather(*(self._residents[name].reside(to[name]) for name in names))
            self._level |= {name: to[name] for name in names}


class InTurn:
    """A handle whose verbs wait for their turn; ``health`` and ``close`` do not."""

    def __init__(self, handle: Any, turns: Turns, verbs: Mapping[str, Turn]) -> None:
        self._handle, self._turns, self._verbs = handle, turns, verbs

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._handle, name)
        return verb if name not in self._verbs else self._gated(verb, self._verbs[name])

    def _gated(self, verb: Callable[..., Awaitable[Any]], turn: Turn) -> Callable[..., Awaitable[Any]]:
        async def in_turn(*args: Any) -> Any:
            async with self._turns.turn(turn):
                return await verb(*args)

        return in_turn
