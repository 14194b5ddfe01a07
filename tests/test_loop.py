"""The driver loop against fakes: order, staleness, updates, and what stops it."""

import asyncio

import pytest

from orchestrator.config import RL
from orchestrator.ledger import Ledger
from orchestrator.loop import StaleRolloutError, train
from orchestrator.publish import Probe, WeightSyncError
from orchestrator.roles import Roles
from tests.fakes import FakeEngine, FakeLearner, FakeReward, prompt

PROBE = Probe(tokens=(1, 2, 3), tolerance=1e-3)


class Recorder:
    """Remembers the age of each batch and the metrics of each step."""

    def __init__(self):
        self.ages, self.metrics, self.began = [], [], None

    async def started(self, step):
        self.began = step

    async def stepped(self, step, groups, batch, metrics):
        self.ages.append(int((step - 1 - batch.versions).max()))
        self.metrics.append(metrics)


def settings(**changes) -> RL:
    fields = {
        "steps": 20,
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "algorithm": {"name": "ppo", "kl_coef": 0.1},
    }
    return RL(**(fields | {"updates": {"epochs": 2, "minibatches": 2}} | changes))


def run(rl: RL, roles: Roles, *, start: int = 0):
    ledger, recorder = Ledger([prompt(row) for row in range(7)], seed=3), Recorder()
    loop = train(rl, roles, ledger, observer=recorder, probe=PROBE, start=start, seed=0, pad_id=0)
    asyncio.run(asyncio.wait_for(loop, 20))
    return ledger, recorder


def fake_roles(**changes) -> Roles:
    fakes = {"critic": FakeLearner(), "reference": FakeLearner(), "reward": FakeReward()}
    return Roles(**({"actor": FakeLearner(), "engine": FakeEngine()} | fakes | changes))


def test_sync_is_on_policy_and_trains_every_prompt_once_in_ledger_order():
    roles = fake_roles()
    ledger, recorder = run(settings(), roles)
    assert set(recorder.ages) == {0}
    expected = Ledger([prompt(row) for row in range(7)], seed=3).prompts()
    assert [s.uid for s in ledger.history] == [next(expected).uid for _ in range(80)]
    assert [s.step for s in ledger.history] == [1 + i // 4 for i in range(80)]


def test_async_is_bounded_and_in_order():
    for staleness in (1, 3):
        _, recorder = run(settings(staleness=staleness), fake_roles())
        assert 0 < max(recorder.ages) <= staleness


def test_every_learner_takes_epochs_times_minibatches_steps_with_weights_that_sum_to_one():
    roles = fake_roles()
    run(settings(steps=3), roles)
    assert roles.actor.updates == roles.critic.updates == 3 * 2 * 2
    assert roles.actor.weights == pytest.approx([1.0] * 12)


def test_grpo_runs_without_critic_and_reference():
    roles = fake_roles(critic=None, reference=None)
    _, recorder = run(settings(algorithm={"name": "grpo", "kl_coef": 0}), roles)
    assert roles.actor.updates == 80
    assert recorder.metrics[0]["actor/loss"] == pytest.approx((1 + 2 + 3 + 4) / 4)


def test_a_mismatched_checksum_stops_the_run_and_names_the_tensor():
    with pytest.raises(WeightSyncError, match=r"engine 0 received 1 of 1 tensors with other bytes .* w$"):
        run(settings(), fake_roles(engine=FakeEngine(checksum=8)))


def test_an_engine_that_computes_with_other_weights_stops_the_run():
    class Stale(FakeEngine):
        async def logprobs(self, tokens):
            return [[-3.5] * (len(tokens) - 1)]

    with pytest.raises(WeightSyncError, match=r"mean difference 2\.5 nats"):
        run(settings(), fake_roles(engine=Stale()))


def test_a_rollout_of_an_older_version_than_allowed_never_enters_a_batch():
    class Frozen(FakeEngine):
        async def receive_weights(self, version):
            receipts = await super().receive_weights(version)
            self.version = 0
            return receipts

    with pytest.raises(StaleRolloutError, match=r"weight versions 0 to 0; rl\.staleness=1 allows 1 to 2"):
        run(settings(staleness=1), fake_roles(engine=Frozen()))


def test_a_failing_reward_ends_the_run_with_its_own_error():
    class Broken(FakeReward):
        async def score(self, rollouts):
            raise RuntimeError("reward says no")

    with pytest.raises(RuntimeError, match="reward says no"):
        run(settings(), fake_roles(reward=Broken()))


def test_resume_hands_out_the_first_unsettled_prompt():
    whole = Ledger([prompt(row) for row in range(7)], seed=3).prompts()
    expected = [next(whole).uid for _ in range(12)]
    ledger = Ledger([prompt(row) for row in range(7)], seed=3)
    ledger.restore({"num_settled": 8, "num_prompts": 7, "seed": 3})
    rest = ledger.prompts()
    assert [next(rest).uid for _ in range(4)] == expected[8:]
