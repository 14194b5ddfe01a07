"""The ledger over kills and resumes: the uids that were trained are those that were planned, each once."""

import asyncio
import json
import random
from itertools import islice

import pytest
import torch

from orchestrator.batch import ScoredRollout
from orchestrator.config import RL
from orchestrator.driver_state import DriverState
from orchestrator.ledger import Ledger
from orchestrator.loop import train
from orchestrator.publish import Probe
from orchestrator.roles import Roles
from orchestrator.shaping import RunningStats
from tests.fakes import FakeEngine, FakeLearner, FakeReward, prompt, rollout

STEPS, PER_STEP = 12, 4


class Killed(RuntimeError):
    """The driver dies here."""


class Dying(FakeEngine):
    """Dies at one of its answers."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    async def generate(self, p, num_samples, sampling):
        self.left -= 1
        if self.left == 0:
            raise Killed
        return await super().generate(p, num_samples, sampling)


class Disk:
    """Keeps the state of every ``every``-th step, and what was trained until then."""

    def __init__(self, every: int):
        self.every, self.kept, self.trained, self.seen = every, None, {}, []

    async def started(self, step):
        self.trained = {k: v for k, v in self.trained.items() if k <= step}

    async def stepped(self, state, groups, batch, metrics):
        self.trained[state.step] = [group[0].rollout.prompt.uid for group in groups]
        self.seen += [one.rollout.uid for group in groups for one in group]
        if state.step % self.every == 0:
            self.kept = json.dumps({"driver": state.plain(), "ledger": self.ledger.state()})


async def one_life(rl: RL, disk: Disk, engine: FakeEngine) -> int:
    """Goes on from the disk; returns how many finished groups were found there."""
    ledger = disk.ledger = Ledger([prompt(row) for row in range(7)], seed=3)
    start, found = DriverState(step=0, kl_coef=0.0, rewards=RunningStats()), 0
    if disk.kept is not None:
        kept = json.loads(disk.kept)
        start = DriverState.restored(kept["driver"])
        ledger.restore(kept["ledger"])
        found = len(kept["ledger"].get("finished", {}))
    roles = Roles(actor=FakeLearner(), engine=engine, reward=FakeReward())
    engine.version = start.step
    probe = Probe(tokens=(1, 2), tolerance=1e-3)
    await train(rl, roles, ledger, observer=disk, probe=probe, start=start, seed=0, pad_id=0)
    return found


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
async def test_over_any_kills_and_resumes_every_planned_uid_is_trained_once(staleness, seed):
    rl = RL(
        steps=STEPS, prompts_per_step=PER_STEP, samples_per_prompt=2, staleness=staleness,
        algorithm={"name": "grpo", "kl_coef": 0},
    )  # fmt: skip
    chance, disk = random.Random(seed), Disk(every=1 + seed % 3)
    for _ in range(8):
        try:
            await asyncio.wait_for(one_life(rl, disk, Dying(chance.randrange(1, 40))), 20)
            break
        except Killed:
            continue
    else:
        await one_life(rl, disk, FakeEngine())
    order = Ledger([prompt(row) for row in range(7)], seed=3).prompts()
    trained = [uid for step in range(1, STEPS + 1) for uid in disk.trained[step]]
    assert trained == [next(order).uid for _ in range(STEPS * PER_STEP)]


async def test_groups_that_are_finished_survive_a_checkpoint_to_the_bit_and_are_not_drawn_again():
    ledger = Ledger([prompt(row) for row in range(7)], seed=3)
    first = next(ledger.prompts())
    scores = {"reference": torch.tensor([0.0, 0.0, -1.1, -0.7])}
    group = [
        ScoredRollout(rollout=rollout(first, k, version=4), reward=0.1 + k, parts={"a": 1 / 3}, scores=scores)
        for k in range(2)
    ]

    async def sample(prompts):
        assert prompts == [first]
        return [group]

    await ledger.once([first], sample)
    again = Ledger([prompt(row) for row in range(7)], seed=3)
    again.restore(json.loads(json.dumps(ledger.state())))

    async def the_other(prompts):
        assert [one.uid for one in prompts] == [second.uid]  # the first is finished
        return [[]]

    _, second = islice(again.prompts(), 2)
    found, drawn = await again.once([first, second], the_other)
    assert drawn == []
    assert [one.rollout for one in found] == [one.rollout for one in group]
    assert [one.reward for one in found] == [0.1, 1.1] and found[0].parts == {"a": 1 / 3}
    assert torch.equal(found[0].scores["reference"], scores["reference"])
    again.settle([first, second], 1)
    assert "finished" not in again.state()
