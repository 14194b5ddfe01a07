"""Routing, seeds and ranks of several engines, their losses and their successors, with ten-line fakes."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from actors.errors import MovedOn, RoleError, WorkerLost
from actors.fleet import EngineFleet
from actors.weights.wire import Address
from orchestrator.batch import Prompt, Rollout
from orchestrator.incidents import Incident, RestartsSpent
from orchestrator.ledger import sample_seed
from orchestrator.roles import Sampling, WeightReceipt
from tests.fakes import rollout

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=4)


class FakeEngine:
    """Remembers what it was asked and answers when the gate opens; ``kill`` ends its process."""

    def __init__(self, name: str = "engine", *, open: bool = False) -> None:
        self.name, self.gate, self.asked, self.rank, self.closed = name, asyncio.Event(), [], 0, False
        self.lives, self.dies_in_sync, self.version, self.serves = 1, 0, 0, True
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.scores = asyncio.Event()
        self.scores.set()
        if open:
            self.gate.set()

    def kill(self) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    async def _alive(self, work: asyncio.Task) -> None:
        await asyncio.wait({work, self.lost}, return_when=asyncio.FIRST_COMPLETED)
        if self.lost.done():
            work.cancel()
            raise WorkerLost(f"{self.name} died")

    async def generate(
        self, prompt: Prompt, num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        assert self.serves, "a half-updated engine was asked"
        self.asked.append((prompt.uid, num_samples, list(seeds)))
        await self._alive(asyncio.create_task(self.gate.wait()))
        return [rollout(prompt, k, version=self.version) for k in range(num_samples)]

    async def join_weights(self, address: Address, rank_offset: int) -> None:
        self.rank = rank_offset

    async def receive_weights(self, version: int) -> list[WeightReceipt]:
        self.serves = False
        await asyncio.sleep(0.01)
        if self.dies_in_sync:
            self.dies_in_sync -= 1
            self.kill()
        if self.lost.done():
            raise WorkerLost(f"{self.name} died")
        self.gate.set()
        self.version = version
        return [WeightReceipt(version=version, checksums={}, who=f"rank {self.rank + k}", num_bytes=0)
                for k in range(2)]  # fmt: skip

    async def commit_weights(self, version: int) -> None:
        assert version == self.version
        self.serves = True

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        await self.scores.wait()
        return [-float(self.rank)] * (len(tokens) - 1)

    async def restart(self) -> None:
        await asyncio.sleep(0.02)
        self.lives, self.version = self.lives + 1, 0
        self.lost = asyncio.get_running_loop().create_future()
        self.serves = False

    def give_up(self, why: str) -> RestartsSpent:
        return RestartsSpent(f"{self.name} has no restarts left: {why}")

    async def health(self) -> None:
        if self.closed:
            raise RuntimeError("closed")

    async def close(self) -> None:
        self.closed = True
        if self.lost.done():
            raise WorkerLost(f"{self.name} died in close")


class FakePolicy:
    """Sends to whoever has joined; ``dies`` receivers break the channel for all."""

    def __init__(self, engines: Sequence[FakeEngine]) -> None:
        self.engines, self.widths, self.sent, self.moved_on = engines, [], [], False

    async def open_channel(self, num_receivers: int) -> Address:
        self.widths.append(num_receivers)
        return Address(transport="gloo", host="h", port=1, world_size=1 + num_receivers, dtype="float32",
                       bucket_bytes=1, timeout_s=1, tensors=())  # fmt: skip

    async def send_weights(self, version: int) -> WeightReceipt:
        if self.moved_on and version in self.sent:
            raise MovedOn("trained since")
        self.sent.append(version)
        before = [engine.lives for engine in self.engines]
        await asyncio.sleep(0.02)
        if any(engine.lost.done() for engine in self.engines) and before:
            raise RoleError("connection closed by peer")
        return WeightReceipt(version=version, checksums={}, who="actor rank 0", num_bytes=0)


def prompt(row: int) -> Prompt:
    return Prompt(uid=f"0/{row}", row=row, tokens=(5, 6), text="", label=None)


def fleet_of(engines: Sequence[FakeEngine], **settings) -> tuple[EngineFleet, list[Incident]]:
    incidents: list[Incident] = []
    fields = {"run_seed": 3, "workers": 2, "restarts": 3, "report": incidents.append} | settings
    return EngineFleet(engines, **fields), incidents


async def sync(fleet: EngineFleet, policy: FakePolicy, version: int) -> list[str]:
    pairs = await fleet.prepare_weights(policy, version)
    await fleet.commit_weights(version)
    return [received.who for _, received in pairs]


async def test_a_prompt_goes_to_the_engine_with_the_fewest_samples_outstanding() -> None:
    engines = [FakeEngine(), FakeEngine()]
    fleet, _ = fleet_of(engines)
    first = [asyncio.create_task(fleet.generate(prompt(row), n, SAMPLING))
             for row, n in ((0, 5), (1, 2), (2, 2), (3, 2))]  # fmt: skip
    await asyncio.sleep(0.01)
    engines[0].gate.set()
    await first[0]  # engine 0 is free again, engine 1 has six
    last = asyncio.create_task(fleet.generate(prompt(4), 1, SAMPLING))
    await asyncio.sleep(0.01)
    engines[1].gate.set()
    await asyncio.gather(*first, last)
    asked = [[uid for uid, _, _ in engine.asked] for engine in engines]
    assert asked == [["0/0", "0/4"], ["0/1", "0/2", "0/3"]]


async def test_seeds_come_from_the_run_and_the_uid_not_from_the_engine() -> None:
    async def run(num_engines: int) -> dict[str, list[int]]:
        engines = [FakeEngine(open=True) for _ in range(num_engines)]
        fleet, _ = fleet_of(engines)
        await asyncio.gather(*(fleet.generate(prompt(row), 2, SAMPLING) for row in range(4)))
        return {uid: seeds for engine in engines for uid, _, seeds in engine.asked}

    one, three = await run(1), await run(3)
    assert one == three
    assert one["0/2"] == [sample_seed(3, "0/2/0"), sample_seed(3, "0/2/1")]


async def test_engines_take_consecutive_ranks_and_all_receive_at_once() -> None:
    engines = [FakeEngine(), FakeEngine()]
    fleet, _ = fleet_of(engines)
    policy = FakePolicy(engines)
    assert await sync(fleet, policy, 9) == ["rank 1", "rank 2", "rank 3", "rank 4"]
    assert await fleet.logprobs([1, 2]) == [[-1.0], [-3.0]]
    await sync(fleet, policy, 10)
    assert policy.widths == [4]  # the channel stays open


async def test_one_sick_engine_makes_the_fleet_sick_and_close_reaches_the_rest() -> None:
    engines = [FakeEngine(), FakeEngine()]
    fleet, _ = fleet_of(engines)
    await engines[1].close()
    with pytest.raises(RuntimeError, match="closed"):
        await fleet.health()
    await fleet.close()
    assert all(engine.closed for engine in engines)


# losses


@pytest.mark.parametrize("num_engines", [1, 2])
async def test_what_a_lost_engine_had_not_finished_is_drawn_again_under_its_uid_and_seeds(
    num_engines,
) -> None:
    """With one engine too: its successor serves after a sync at the version that the fleet serves."""
    engines = [FakeEngine(f"engine {k}") for k in range(num_engines)]
    fleet, incidents = fleet_of(engines)
    policy = FakePolicy(engines)
    await sync(fleet, policy, 4)
    engines[0].gate.clear()
    answers = [asyncio.create_task(fleet.generate(prompt(row), 2, SAMPLING)) for row in range(3)]
    await asyncio.sleep(0.01)
    planned = {uid: seeds for uid, _, seeds in engines[0].asked}
    engines[0].kill()
    groups = await asyncio.wait_for(asyncio.gather(*answers), 5)
    assert [[r.uid for r in group] for group in groups] == [
        [f"0/{row}/{k}" for k in range(2)] for row in range(3)
    ]
    assert {v for group in groups for r in group for v in r.versions} <= {0, 4}
    replanned = [incident.detail for incident in incidents if incident.kind == "replanned"]
    assert sorted(replanned) == sorted(planned) and planned
    again = {uid: seeds for engine in engines for uid, _, seeds in engine.asked}
    assert {uid: again[uid] for uid in planned} == planned
    while fleet._in(fleet._members[0].state.__class__.SERVING) != fleet._members:
        await asyncio.sleep(0.01)
    assert engines[0].lives == 2 and engines[0].version == 4 and engines[0].serves


async def test_a_loss_that_is_learned_when_the_successor_serves_is_not_its_loss() -> None:
    """One engine dies in the probe, and has a successor before the other has answered the probe."""
    engines = [FakeEngine("engine 0", open=True), FakeEngine("engine 1", open=True)]
    fleet, _ = fleet_of(engines)
    policy = FakePolicy(engines)
    await sync(fleet, policy, 1)

    async def dies(tokens: Sequence[int]) -> list[float]:
        engines[0].kill()
        raise WorkerLost("engine 0 died")

    async def takes_long(tokens: Sequence[int]) -> list[float]:
        await asyncio.sleep(0.3)
        return [-1.0]

    engines[0].logprobs, engines[1].logprobs = dies, takes_long
    probe = asyncio.create_task(fleet.logprobs([1, 2]))
    await asyncio.sleep(0.01)
    await fleet.generate(prompt(0), 1, SAMPLING)  # engine 0 is asked first: its loss is known
    await asyncio.sleep(0.1)
    assert (engines[0].lives, engines[0].serves, probe.done()) == (2, True, False)
    assert await probe == [[-1.0]]
    await asyncio.sleep(0.1)
    assert (engines[0].lives, engines[0].serves) == (2, True)


async def test_a_successor_that_the_policy_has_left_behind_waits_for_the_next_sync() -> None:
    engines = [FakeEngine("engine 0"), FakeEngine("engine 1")]
    fleet, _ = fleet_of(engines)
    policy = FakePolicy(engines)
    await sync(fleet, policy, 1)
    policy.moved_on = True
    engines[0].gate.clear()
    first, second = (asyncio.create_task(fleet.generate(prompt(row), 1, SAMPLING)) for row in range(2))
    await asyncio.sleep(0.01)
    engines[0].kill()
    await asyncio.gather(first, second)
    await asyncio.sleep(0.1)  # it has restarted
    assert engines[0].lives == 2 and not engines[0].serves
    asked = len(engines[0].asked)
    await fleet.generate(prompt(2), 1, SAMPLING)
    assert len(engines[0].asked) == asked
    assert await sync(fleet, policy, 2) == ["rank 1", "rank 2", "rank 3", "rank 4"]
    assert engines[0].serves and engines[0].version == 2


async def test_a_policy_that_dies_while_it_brings_a_successor_its_weights_is_no_hang() -> None:
    engines = [FakeEngine("engine 0")]
    fleet, _ = fleet_of(engines)
    policy = FakePolicy(engines)
    await sync(fleet, policy, 1)
    engines[0].gate.clear()
    answer = asyncio.create_task(fleet.generate(prompt(0), 1, SAMPLING))
    await asyncio.sleep(0.01)

    async def dead(num_receivers: int) -> Address:
        raise WorkerLost("actor rank 0 died in open_channel")

    policy.open_channel = dead
    engines[0].kill()
    with pytest.raises(WorkerLost, match="actor rank 0 died"):
        await asyncio.wait_for(answer, 5)
    rebuilt = FakePolicy(engines)
    await sync(fleet, rebuilt, 1)
    assert engines[0].serves
    assert len(await fleet.generate(prompt(0), 1, SAMPLING)) == 1


async def test_an_engine_that_dies_in_a_sync_is_left_out_and_nobody_serves_half_of_one() -> None:
    engines = [FakeEngine(f"engine {k}", open=True) for k in range(3)]
    fleet, incidents = fleet_of(engines)
    policy = FakePolicy(engines)
    await sync(fleet, policy, 1)
    engines[1].dies_in_sync = 1
    pairs = await fleet.prepare_weights(policy, 2)
    assert [received.who for _, received in pairs] == ["rank 1", "rank 2", "rank 3", "rank 4"]
    assert policy.widths[:2] == [6, 4]  # a new channel without it
    assert not any(engine.serves for engine in engines)
    waiting = asyncio.create_task(fleet.generate(prompt(0), 1, SAMPLING))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await fleet.commit_weights(2)
    assert [max(r.versions) for r in await waiting] == [2]
    assert "left the sync" in [incident.kind for incident in incidents]
    await asyncio.sleep(0.2)
    assert engines[1].serves and engines[1].version == 2  # it came back by itself


async def test_a_crash_loop_ends_with_an_error_that_says_so() -> None:
    class Dies(FakeEngine):
        async def generate(self, *question: Any) -> list[Rollout]:
            self.kill()
            return await super().generate(*question)

    engines = [Dies("engine 0")]
    fleet, _ = fleet_of(engines, restarts=2)
    policy = FakePolicy(engines)
    await sync(fleet, policy, 1)
    answer = asyncio.create_task(fleet.generate(prompt(0), 1, SAMPLING))
    with pytest.raises(RestartsSpent, match="engine 0 has no restarts left"):
        await asyncio.wait_for(answer, 5)
    assert engines[0].lives == 3
    assert await fleet.prepare_weights(policy, 2) == []  # the step is finished all the same
