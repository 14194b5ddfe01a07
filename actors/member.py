"""What a fleet knows of each of its engines."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from enum import Enum
from typing import Protocol

from actors.budget import Budget
from actors.weights.wire import Address
from orchestrator.batch import Prompt, Rollout
from orchestrator.incidents import RestartsSpent
from orchestrator.roles import Residency, Sampling, WeightReceipt


class EngineHandle(Protocol):
    """One engine and its successors, here or behind Ray. Verbs raise WorkerLost when its process is gone."""

    async def generate(
        self, prompt: Prompt, num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]: ...
    async def join_weights(self, address: Address, rank_offset: int) -> None: ...
    async def receive_weights(self, version: int) -> list[WeightReceipt]: ...
    async def commit_weights(self, version: int) -> None: ...
    async def logprobs(self, tokens: Sequence[int]) -> list[float]: ...
    async def reside(self, level: Residency) -> None: ...
    async def restart(self) -> None: ...
    def give_up(self, why: str) -> RestartsSpent: ...
    async def health(self) -> None: ...
    async def close(self) -> None: ...


class State(Enum):
    SERVING, WAITING, AWAY, RETIRED, LEAVING = range(5)


class Member:
    """One process of an engine. Its successor is another member: who still speaks of the old process, whose
    loss he learned late, does not mean the new one."""

    def __init__(self, engine: EngineHandle, restarts: int) -> None:
        self.engine, self.budget = engine, Budget(restarts)
        self.state = State.SERVING  # with the weights of the model folder, until there are others
        self.asked = 0  # samples, or sequences to score, that it has not yet answered
        self.given_up: RestartsSpent | None = None

    async def generate(
        self, prompt: Prompt, num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        with self._asking(num_samples):
            return await self.engine.generate(prompt, num_samples, sampling, seeds)

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        with self._asking(1):
            return await self.engine.logprobs(tokens)

    @contextmanager
    def _asking(self, sequences: int) -> Iterator[None]:
        self.asked += sequences
        try:
            yield
        finally:
            self.asked -= sequences

    def successor(self) -> "Member":
        """Of the same engine and budget; it waits for weights."""
        successor = copy(self)
        successor.state, successor.asked = State.WAITING, 0
        return successor
