"""One engine behind Ray: the verbs of ``EngineWorker``, each with its deadline, and its successors."""

from collections.abc import Sequence

from actors.remote_worker import RemoteWorker
from actors.weights.wire import Address
from orchestrator.batch import Prompt, Rollout
from orchestrator.incidents import RestartsSpent
from orchestrator.roles import Residency, Sampling, WeightReceipt


class RemoteEngine:
    """Implements ``fleet.EngineHandle``."""

    def __init__(self, worker: RemoteWorker) -> None:
        self._worker = worker

    @property
    def incarnation(self) -> int:
        return self._worker.incarnation

    async def start(self) -> None:
        """Loads the model; its processes are in the roster and watched."""
        worker, limit = self._worker, self._worker.deadlines.start_s
        worker.attend(await worker.call(worker.handle.describe, deadline_s=limit), ready=False)
        await worker.call(worker.handle.start, deadline_s=limit)
        worker.attend(await worker.call(worker.handle.describe), ready=True)

    async def restart(self) -> None:
        """The successor, in the same seat, with the weights of the model folder."""
        self._worker.revive()
        await self.start()
        self._worker.recovered()

    def give_up(self, why: str) -> RestartsSpent:
        return self._worker.give_up(why)

    async def generate(
        self, prompt: Prompt, num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        verb = self._worker.handle.generate
        return await self._worker.call(verb, prompt, num_samples, sampling, list(seeds))

    async def join_weights(self, address: Address, rank_offset: int) -> None:
        limit = self._worker.deadlines.sync_s
        await self._worker.call(self._worker.handle.join_weights, address, rank_offset, deadline_s=limit)

    async def receive_weights(self, version: int) -> list[WeightReceipt]:
        limit = self._worker.deadlines.sync_s
        return await self._worker.call(self._worker.handle.receive_weights, version, deadline_s=limit)

    async def commit_weights(self, version: int) -> None:
        limit = self._worker.deadlines.sync_s
        await self._worker.call(self._worker.handle.commit_weights, version, deadline_s=limit)

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        return await self._worker.call(self._worker.handle.logprobs, list(tokens))

    async def reside(self, level: Residency) -> None:
        await self._worker.call(self._worker.handle.reside, level)

    async def health(self) -> None:
        await self._worker.call(self._worker.handle.health)

    async def close(self) -> None:
        """Lets vLLM end its children first, then ends the process."""
        self._worker.unwatch()
        try:
            await self._worker.call(self._worker.handle.close, deadline_s=30)
        finally:
            self._worker.dismiss()
