"""One engine behind Ray: the verbs of ``EngineWorker``, each with its deadline."""

from collections.abc import Sequence

import ray

from actors.group import RemoteWorker
from actors.weights.wire import Address
from actors.worker import RosterLine
from orchestrator.batch import Prompt, Rollout
from orchestrator.roles import Residency, Sampling, WeightReceipt


class RemoteEngine:
    """Implements ``fleet.EngineHandle``."""

    def __init__(self, worker: RemoteWorker) -> None:
        self._worker, self._engine = worker, worker.handle

    async def start(self) -> None:
        await self._worker.call(self._engine.start, deadline_s=self._worker.deadlines.start_s)

    async def describe(self) -> list[RosterLine]:
        """The engine's own process first, then vLLM's."""
        return await self._worker.call(self._engine.describe)

    async def generate(
        self, prompt: Prompt, num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        return await self._worker.call(self._engine.generate, prompt, num_samples, sampling, list(seeds))

    async def join_weights(self, address: Address, rank_offset: int) -> None:
        await self._worker.call(self._engine.join_weights, address, rank_offset)

    async def receive_weights(self, version: int) -> list[WeightReceipt]:
        limit = self._worker.deadlines.sync_s
        return await self._worker.call(self._engine.receive_weights, version, deadline_s=limit)

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        return await self._worker.call(self._engine.logprobs, list(tokens))

    async def reside(self, level: Residency) -> None:
        await self._worker.call(self._engine.reside, level)

    async def health(self) -> None:
        await self._worker.call(self._engine.health)

    async def close(self) -> None:
        """Lets vLLM end its children first, then ends the process."""
        try:
            await self._worker.call(self._engine.close, deadline_s=30)
        finally:
            ray.kill(self._engine)
