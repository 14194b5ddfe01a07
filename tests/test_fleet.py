"""Routing, seeds and ranks of several engines, with ten-line fakes."""

import asyncio
from collections.abc import Sequence

import pytest

from actors.fleet import EngineFleet
from actors.weights.wire import Address
from orchestrator.batch import Prompt, Rollout
from orchestrator.ledger import sample_seed
from orchestrator.roles import Sampling, WeightReceipt

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=4)


class FakeEngine:
    """Remembers what it was asked and answers when the gate opens."""

    def __init__(self) -> None:
        self.gate, self.asked, self.rank, self.closed = asyncio.Event(), [], 0, False

    async def generate(
        self, prompt: Prompt, num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        self.asked.append((prompt.uid, num_samples, list(seeds)))
        await self.gate.wait()
        return []

    async def join_weights(self, address: Address, rank_offset: int) -> None:
        self.rank = rank_offset

    async def receive_weights(self, version: int) -> list[WeightReceipt]:
        self.gate.set()
        return [
            WeightReceipt(version=version, checksums={}, who=f"rank {self.rank + k}", num_bytes=0)
            for k in range(2)
        ]

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        return [-float(self.rank)] * (len(tokens) - 1)

    async def health(self) -> None:
        if self.closed:
            raise RuntimeError("closed")

    async def close(self) -> None:
        self.closed = True


def prompt(row: int) -> Prompt:
    return Prompt(uid=f"0/{row}", row=row, tokens=(5, 6), text="", label=None)


def address(world_size: int) -> Address:
    return Address(
        transport="gloo",
        host="h",
        port=1,
        world_size=world_size,
        dtype="float32",
        bucket_bytes=1,
        timeout_s=1,
        tensors=(),
    )


def test_a_prompt_goes_to_the_engine_with_the_fewest_samples_outstanding() -> None:
    async def run() -> list[list[str]]:
        engines = [FakeEngine(), FakeEngine()]
        fleet = EngineFleet(engines, run_seed=0)
        first = [
            asyncio.create_task(fleet.generate(prompt(row), n, SAMPLING))
            for row, n in ((0, 5), (1, 2), (2, 2), (3, 2))
        ]
        await asyncio.sleep(0)
        engines[0].gate.set()
        await first[0]  # engine 0 is free again, engine 1 has six
        last = asyncio.create_task(fleet.generate(prompt(4), 1, SAMPLING))
        await asyncio.sleep(0)
        engines[1].gate.set()
        await asyncio.gather(*first, last)
        return [[uid for uid, _, _ in engine.asked] for engine in engines]

    assert asyncio.run(run()) == [["0/0", "0/4"], ["0/1", "0/2", "0/3"]]


def test_seeds_come_from_the_run_and_the_uid_not_from_the_engine() -> None:
    async def run(num_engines: int) -> dict[str, list[int]]:
        engines = [FakeEngine() for _ in range(num_engines)]
        for engine in engines:
            engine.gate.set()
        fleet = EngineFleet(engines, run_seed=3)
        await asyncio.gather(*(fleet.generate(prompt(row), 2, SAMPLING) for row in range(4)))
        return {uid: seeds for engine in engines for uid, _, seeds in engine.asked}

    one, three = asyncio.run(run(1)), asyncio.run(run(3))
    assert one == three
    assert one["0/2"] == [sample_seed(3, "0/2/0"), sample_seed(3, "0/2/1")]


def test_engines_take_consecutive_ranks_and_all_receive_at_once() -> None:
    async def run() -> list[str]:
        fleet = EngineFleet([FakeEngine(), FakeEngine()], run_seed=0)
        await fleet.join_weights(address(5))
        assert await fleet.logprobs([1, 2]) == [[-1.0], [-3.0]]
        return [receipt.who for receipt in await fleet.receive_weights(9)]

    assert asyncio.run(run()) == ["rank 1", "rank 2", "rank 3", "rank 4"]


def test_a_world_that_does_not_split_over_the_engines_is_refused() -> None:
    fleet = EngineFleet([FakeEngine(), FakeEngine()], run_seed=0)
    with pytest.raises(ValueError, match="world_size=4 is not 1 \\+ a multiple of 2 engines"):
        asyncio.run(fleet.join_weights(address(4)))


def test_one_sick_engine_makes_the_fleet_sick_and_close_reaches_the_rest() -> None:
    async def run() -> list[FakeEngine]:
        engines = [FakeEngine(), FakeEngine()]
        fleet = EngineFleet(engines, run_seed=0)
        await engines[1].close()
        with pytest.raises(RuntimeError, match="closed"):
            await fleet.health()
        await fleet.close()
        return engines

    assert all(engine.closed for engine in asyncio.run(run()))
