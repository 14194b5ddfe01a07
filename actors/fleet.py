"""Several engines behind one handle: each prompt goes to the engine with the least work; weights go to all at
once.

Which engine samples a prompt depends on who is free, so nothing random may: the seeds come from the run's
seed and the sample's uid, and a run draws the same samples however many engines it has.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from actors.weights.wire import Address
from orchestrator.batch import Prompt, Rollout
from orchestrator.ledger import sample_seed
from orchestrator.roles import Residency, Sampling, WeightReceipt


class EngineHandle(Protocol):
    """An ``EngineWorker``, here or behind Ray."""

    async def generate(
        self, prompt: Prompt, num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]: ...
    async def join_weights(self, address: Address, rank_offset: int) -> None: ...
    async def receive_weights(self, version: int) -> list[WeightReceipt]: ...
    async def logprobs(self, tokens: Sequence[int]) -> list[float]: ...
    async def reside(self, level: Residency) -> None: ...
    async def health(self) -> None: ...
    async def close(self) -> None: ...


class EngineFleet:
    """Implements ``orchestrator.roles.Engine`` over N engines."""

    def __init__(self, engines: Sequence[EngineHandle], *, run_seed: int) -> None:
        if not engines:
            raise ValueError("a fleet needs an engine; set engine.replicas to 1 or more")
        self._engines, self._run_seed = list(engines), run_seed
        self._waiting = [0] * len(self._engines)  # samples asked for and not yet answered

    async def generate(self, prompt: Prompt, num_samples: int, sampling: Sampling) -> list[Rollout]:
        """The samples of one prompt stay on one engine, which prefills the prompt once."""
        seeds = [sample_seed(self._run_seed, f"{prompt.uid}/{k}") for k in range(num_samples)]
        index = self._waiting.index(min(self._waiting))
        self._waiting[index] += num_samples
        try:
            return await self._engines[index].generate(prompt, num_samples, sampling, seeds)
        finally:
            self._waiting[index] -= num_samples

    async def join_weights(self, address: Address) -> None:
        """After every ``Sender.open``. Rank 0 is the sender; engine i has the next ranks in turn."""
        workers, left = divmod(address.world_size - 1, len(self._engines))
        if left or not workers:
            raise ValueError(
                f"world_size={address.world_size} is not 1 + a multiple of {len(self._engines)} engines; "
                "open the sender with 1 + replicas x tensor_parallel"
            )
        await asyncio.gather(
            *(engine.join_weights(address, 1 + i * workers) for i, engine in enumerate(self._engines))
        )

    async def receive_weights(self, version: int) -> list[WeightReceipt]:
        """All engines at once: they are members of one group."""
        receipts = await asyncio.gather(*(engine.receive_weights(version) for engine in self._engines))
        return [receipt for each in receipts for receipt in each]

    async def logprobs(self, tokens: Sequence[int]) -> list[list[float]]:
        return await asyncio.gather(*(engine.logprobs(tokens) for engine in self._engines))

    async def reside(self, level: Residency) -> None:
        await asyncio.gather(*(engine.reside(level) for engine in self._engines))

    async def health(self) -> None:
        await asyncio.gather(*(engine.health() for engine in self._engines))

    async def close(self) -> None:
        """Closes every engine, and then raises what the first failing one said."""
        answers = await asyncio.gather(*(engine.close() for engine in self._engines), return_exceptions=True)
        if errors := [answer for answer in answers if isinstance(answer, BaseException)]:
            raise errors[0]
