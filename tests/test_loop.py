"""The driver loop against fakes: order, staleness, updates, and what stops it."""

import asyncio
import json
from dataclasses import replace

import pytest

from orchestrator.algorithms.grpo import GRPO
from orchestrator.config import RL
from orchestrator.drawing import prompts_at_once
from orchestrator.driver_state import DriverState
from orchestrator.filters import GroupFilter
from orchestrator.ledger import Ledger
from orchestrator.loop import StaleRolloutError, one_ahead, train
from orchestrator.publish import Probe, WeightSyncError
from orchestrator.roles import Roles
from orchestrator.shaping import RunningStats
from tests.fakes import FakeEngine, FakeLearner, FakeReward, prompt, rollout

PROBE = Probe(tokens=(1, 2, 3), tolerance=1e-3)


class Recorder:
    """Remembers the age of each batch and the metrics of each step."""

    def __init__(self):
        self.ages, self.metrics, self.began = [], [], None
        self.states, self.batches, self.groups = [], [], []

    async def started(self, step):
        self.began = step

    async def stepped(self, state, groups, batch, metrics):
        self.ages.append(int((state.step - 1 - batch.versions[batch.action_mask]).max()))
        self.metrics.append(metrics)
        self.states.append(state)
        self.batches.append(batch)
        self.groups.append(groups)


def settings(**changes) -> RL:
    fields = {
        "steps": 20,
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "algorithm": {"name": "ppo", "kl_coef": 0.1},
    }
    return RL(**(fields | {"updates": {"epochs": 2, "minibatches": 2}} | changes))


def fresh(rl: RL) -> DriverState:
    return DriverState(step=0, kl_coef=rl.algorithm.initial_kl_coef, rewards=RunningStats())


def run(rl: RL, roles: Roles, *, start: DriverState | None = None):
    ledger, recorder = Ledger([prompt(row) for row in range(7)], seed=3), Recorder()
    start = start or fresh(rl)
    loop = train(rl, roles, ledger, observer=recorder, probe=PROBE, start=start, seed=0, pad_id=0)
    asyncio.run(asyncio.wait_for(loop, 20))
    return ledger, recorder


def fake_roles(**changes) -> Roles:
    fakes = {"critic": FakeLearner(), "reference": FakeLearner(), "reward": FakeReward()}
    return Roles(**({"actor": FakeLearner(), "engine": FakeEngine()} | fakes | changes))


@pytest.mark.parametrize(
    ("per_step", "samples", "tokens", "most", "filtered", "at_once"),
    [
        (64, 4, 5, 256, False, 8),
        (9, 4, 20, 256, False, 3),
        (6, 1, 1, 256, False, 6),
        (4, 2, 200, 256, False, 1),
        (8, 4, 64, 2048, False, 8),
        (64, 4, 5, 256, True, 1),
    ],
)
def test_groups_of_few_tokens_are_sampled_together(per_step, samples, tokens, most, filtered, at_once):
    """Room for 12, 3, 256, 0, 8 groups; the largest divisor of the step's prompts."""
    rl = RL(
        algorithm={"name": "grpo"}, prompts_per_step=per_step, samples_per_prompt=samples,
        sampling={"max_new_tokens": tokens}, filter=GroupFilter() if filtered else None, score_tokens=most,
    )  # fmt: skip
    assert prompts_at_once(rl) == at_once


def test_the_order_in_which_groups_are_finished_changes_no_call_of_a_scorer():
    """Bits of a score depend on what is computed beside it, and when an answer comes is chance."""

    class Listed(FakeReward):
        def __init__(self):
            self.calls = []

        async def score(self, rollouts):
            self.calls.append([r.uid for r in rollouts])
            return await super().score(rollouts)

    rewards = [Listed() for _ in range(3)]
    for reward in rewards:  # the fake engine answers after a random moment
        run(settings(steps=2, sampling={"max_new_tokens": 60}), fake_roles(reward=reward))
    assert {len(call) for call in rewards[0].calls} == {4}  # two groups of two
    assert all(sorted(reward.calls) == sorted(rewards[0].calls) for reward in rewards)


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


class Longer(FakeEngine):
    """Sample k has k + 1 tokens."""

    async def generate(self, p, num_samples, sampling):
        drawn = await super().generate(p, num_samples, sampling)
        return [rollout(p, k, version=r.versions[-1], response=(5,) * (k + 1)) for k, r in enumerate(drawn)]


class SlowLearner(FakeLearner):
    """Takes one minibatch at a time, as a worker does; remembers how many it had when it took each."""

    def __init__(self):
        super().__init__()
        self.at_work, self.asked, self.queued = asyncio.Lock(), 0, []

    async def update(self, minibatch):
        self.asked += 1
        async with self.at_work:
            await asyncio.sleep(0.005)
            self.queued.append(self.asked - self.updates)
            return await super().update(minibatch)


def test_the_next_minibatch_waits_at_the_learner_and_no_more_than_one():
    roles = fake_roles(actor=SlowLearner(), critic=SlowLearner())
    _, recorder = run(settings(steps=2), roles)  # four optimizer steps each
    assert roles.actor.queued == roles.critic.queued == [2, 2, 2, 1] * 2
    assert [m["actor/loss"] for m in recorder.metrics] == [2.5, 6.5]  # of 1 to 4 and of 5 to 8


async def test_what_waits_behind_a_failed_call_is_taken_back():
    made, done = [], []

    async def call(number):
        made.append(number)
        await asyncio.sleep(0.005 * (1 + number))
        if number == 1:
            raise RuntimeError("worker lost")
        done.append(number)

    with pytest.raises(RuntimeError, match="worker lost"):
        await one_ahead(call(number) for number in range(5))
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert (made, done) == ([0, 1, 2], [0])


@pytest.mark.parametrize(
    ("own", "weights"),
    [(None, [1 / 8, 1 / 16, 1 / 16]), ("token_mean", [1 / 12] * 3), ("constant_length", [1 / 80] * 3)],
)
def test_weights_follow_the_algorithms_rule_unless_the_run_has_one(own, weights):
    """GRPO's sequences weigh 1/8 each; tokens 1 / (4 x 3); by constant length 1 / (8 x 10)."""
    seen = []

    class Spy(FakeLearner):
        async def update(self, minibatch):
            seen.extend(minibatch.weights[minibatch.weights > 0].tolist())
            return await super().update(minibatch)

    rl = settings(
        steps=1, algorithm={"name": "grpo", "kl_coef": 0}, sampling={"max_new_tokens": 10},
        updates={"aggregate": own},
    )  # fmt: skip
    run(rl, fake_roles(engine=Longer(), critic=None, reference=None, actor=Spy()))
    assert seen == pytest.approx(weights * 4)


def test_every_step_shuffles_its_rows_anew():
    orders = []

    class Spy(FakeLearner):
        async def update(self, minibatch):
            orders.append(tuple(minibatch.rows.tolist()))
            return await super().update(minibatch)

    rl = settings(steps=6, updates={"minibatches": 2})
    run(rl, fake_roles(actor=Spy()))
    first, orders = orders, []
    assert len(set(first[::2])) == 6
    run(rl, fake_roles(actor=Spy()))
    assert orders == first  # and a run of the same seed alike


def test_grpo_runs_without_critic_and_reference():
    roles = fake_roles(critic=None, reference=None)
    _, recorder = run(settings(algorithm={"name": "grpo", "kl_coef": 0}), roles)
    assert roles.actor.updates == 80
    assert recorder.metrics[0]["actor/loss"] == pytest.approx((1 + 2 + 3 + 4) / 4)


def test_a_mismatched_checksum_stops_the_run_and_names_the_tensor():
    with pytest.raises(WeightSyncError, match=r"engine 0 received 1 of 1 tensors with other bytes .* w$"):
        run(settings(), fake_roles(engine=FakeEngine(checksum=8)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 5}, "engine 0 serves weight version 5, actor rank 0 sent 0"),
        ({"checksums": {}}, r"other tensors than actor rank 0 sent: missing \['w'\], extra \[\]"),
        ({"checksums": {"w": 7, "v": 7}}, r"other tensors .* missing \[\], extra \['v'\]"),
    ],
)
def test_a_receipt_that_is_not_the_actors_stops_the_run(change, said):
    """BUGS D5, D8. The second of two engines, too."""

    class Two(FakeEngine):
        async def prepare_weights(self, policy, version):
            ((sent, good),) = await super().prepare_weights(policy, version)
            return [(sent, replace(good, who="engine 1")), (sent, replace(good, **change))]

    with pytest.raises(WeightSyncError, match=said):
        run(settings(), fake_roles(engine=Two()))


@pytest.mark.parametrize(("logprob", "diff"), [(-3.5, r"2\.5"), (float("nan"), "nan")])
def test_every_engine_is_probed(logprob, diff):
    """BUGS D1: the second of two gives other log-probs, or none."""

    class Two(FakeEngine):
        async def logprobs(self, tokens):
            return [*await super().logprobs(tokens), [logprob] * (len(tokens) - 1)]

    with pytest.raises(WeightSyncError, match=rf"engine 1 gives the probe .* mean difference {diff} nats"):
        run(settings(), fake_roles(engine=Two()))


def test_an_engine_that_computes_with_other_weights_stops_the_run():
    class Stale(FakeEngine):
        async def logprobs(self, tokens):
            return [[-3.5] * (len(tokens) - 1)]

    engine = Stale()
    with pytest.raises(WeightSyncError, match=r"mean difference 2\.5 nats"):
        run(settings(), fake_roles(engine=engine))
    assert engine.version == 0  # nothing learned from its samples was sent on


def test_the_probe_speaks_of_the_weights_that_were_sent():
    """The engine answers late, when the actor has long gone on."""

    class Moving(FakeLearner):
        async def logprobs(self, tokens):
            return [-float(self.updates)] * (len(tokens) - 1)

    class Slow(FakeEngine):
        async def prepare_weights(self, policy, version):
            self.received = actor.updates
            return await super().prepare_weights(policy, version)

        async def logprobs(self, tokens):
            received = self.received
            await asyncio.sleep(0.01)
            return [[-float(received)] * (len(tokens) - 1)]

    actor = Moving()
    _, recorder = run(settings(staleness=1), fake_roles(actor=actor, engine=Slow()))
    assert [metrics["probe_diff"] for metrics in recorder.metrics] == [0.0] * 20


def test_a_rollout_of_an_older_version_than_allowed_never_enters_a_batch():
    class Frozen(FakeEngine):
        async def commit_weights(self, version):
            self.version = 0

    with pytest.raises(StaleRolloutError, match=r"weight versions 0 to 0; rl\.staleness=1 allows 1 to 2"):
        run(settings(staleness=1), fake_roles(engine=Frozen()))


@pytest.mark.parametrize(
    ("ages", "said"),
    [((1, 0), "weight versions -1 to 0"), ((0, -1), "weight versions 0 to 1"), ((0, 1), "versions -1 to 0")],
)
def test_one_token_of_other_weights_keeps_a_rollout_out_of_the_batch(ages, said):
    """BUGS D5: one of the two tokens is older than allowed, or of weights that are not there yet."""

    class Mixed(FakeEngine):
        async def generate(self, p, num_samples, sampling):
            drawn = await super().generate(p, num_samples, sampling)
            versions = (0, 0, *(self.version - age for age in ages))
            return [replace(each, versions=versions) for each in drawn]

    with pytest.raises(StaleRolloutError, match=said):
        run(settings(), fake_roles(engine=Mixed()))


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


# groups without signal


class Flat(FakeReward):
    """All samples of an even row earn the same: their groups teach nothing."""

    async def score(self, rollouts):
        scored = await super().score(rollouts)
        return [replace(s, reward=s.reward * (s.rollout.prompt.row % 2)) for s in scored]


def filtering(max_draws: int, **changes) -> RL:
    rl = settings(algorithm={"name": "grpo", "kl_coef": 0}, **changes)
    return rl.model_copy(update={"filter": GroupFilter(max_draws=max_draws)})


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_groups_without_signal_are_replaced_and_every_prompt_is_used_up_once_in_order(staleness):
    rl = filtering(10, staleness=staleness)
    ledger, recorder = run(rl, fake_roles(critic=None, reference=None, reward=Flat()))
    assert all(group[0].rollout.prompt.row % 2 for groups in recorder.groups for group in groups)
    assert [len(groups) for groups in recorder.groups] == [4] * 20
    assert max(recorder.ages) <= staleness
    order = Ledger([prompt(row) for row in range(7)], seed=3).prompts()
    uids = [next(order).uid for _ in range(200)]
    for step, metrics in enumerate(recorder.metrics, start=1):
        used = [s.uid for s in ledger.history if s.step == step]
        assert metrics["groups_drawn"] == len(used) and metrics["groups_not_replaced"] == 0
        assert metrics["groups_dropped"] == sum(int(uid.split("/")[1]) % 2 == 0 for uid in used)
    assert [s.uid for s in ledger.history] == uids[: len(ledger.history)]
    assert ledger.state()["num_settled"] == len(ledger.history) > 80


@pytest.mark.parametrize("staleness", [0, 2])
def test_refilling_ends_and_the_batch_keeps_its_size(staleness):
    """No group has signal: 2 draws a prompt are 8 groups, of which the last 4 stay."""

    class Nothing(FakeReward):
        async def score(self, rollouts):
            return [replace(s, reward=1.0) for s in await super().score(rollouts)]

    rl = filtering(2, staleness=staleness, steps=6)
    ledger, recorder = run(rl, fake_roles(critic=None, reference=None, reward=Nothing()))
    order = Ledger([prompt(row) for row in range(7)], seed=3).prompts()
    for groups, metrics in zip(recorder.groups, recorder.metrics, strict=True):
        drawn = [next(order).uid for _ in range(8)]
        assert [group[0].rollout.prompt.uid for group in groups] == drawn[4:]
        assert (metrics["groups_drawn"], metrics["groups_dropped"], metrics["groups_not_replaced"]) == (
            8,
            8,
            4,
        )
    assert max(recorder.ages) <= staleness
    assert ledger.state()["num_settled"] == 6 * 8


# what an algorithm asks for


class Greedy(GRPO):
    greedy_baseline = True


def test_a_greedy_response_is_drawn_beside_the_samples_and_its_reward_is_their_baseline():
    rl = settings(steps=2, algorithm={"name": "grpo", "kl_coef": 0})
    rl = rl.model_copy(update={"algorithm": Greedy(kl_coef=0)})
    roles = fake_roles(critic=None, reference=None)
    _, recorder = run(rl, roles)
    assert [s.baseline for group in recorder.groups[0] for s in group] == [5.0] * 8
    assert recorder.batches[0].baselines.tolist() == [5.0] * 8
    assert recorder.batches[0].rewards.tolist() == [0.0, 1.0] * 4  # the greedy one is no sample
    assert roles.engine.temperatures.count(0.0) == roles.engine.temperatures.count(1.0) == 8
    assert len(set(roles.engine.seen)) == 16


class Full(GRPO):
    @property
    def wants_distribution(self):
        return True


def test_distributions_come_from_policy_and_reference_and_give_the_logprobs_of_the_tokens():
    rl = settings(steps=1).model_copy(update={"algorithm": Full(kl_coef=0.1)})
    roles, seen = fake_roles(critic=None), {}

    class Spy(Full):
        def experience(self, batch, scores, kl_coef):
            seen.update(scores)
            return super().experience(batch, scores, kl_coef)

    run(rl.model_copy(update={"algorithm": Spy(kl_coef=0.1)}), roles)
    assert seen["actor_distribution"].shape == seen["reference_distribution"].shape == (8, 4, 10)
    assert seen["actor"][0].tolist() == seen["reference"][0].tolist() == [0, 0, -5, -9]  # tokens 1 2 5 9
    assert (roles.actor.scored, roles.reference.scored) == (1, 1)  # one forward pass each


@pytest.mark.parametrize(
    ("rule", "updates", "passes", "ratio_from"),
    [("auto", 1, 0, None), ("auto", 2, 1, -1.0), ("recompute", 1, 1, -1.0), ("rollout", 2, 0, -1.0)],
)
def test_old_logprobs_are_recomputed_or_taken_as_they_are(rule, updates, passes, ratio_from):
    roles, olds = fake_roles(critic=None, reference=None), []

    class Spy(FakeLearner):
        async def update(self, minibatch):
            olds.append(minibatch.records.old_logprobs)
            return await super().update(minibatch)

    roles = replace(roles, actor=Spy())
    chosen = {"epochs": 1, "minibatches": updates, "old_logprobs": rule}
    _, recorder = run(settings(steps=1, updates=chosen, algorithm={"name": "grpo", "kl_coef": 0}), roles)
    assert (roles.actor.scored, roles.actor.scored_early) == (0, 8 * passes)
    assert ("rollout_logprob_diff_mean" in recorder.metrics[0]) == (passes == 1)
    assert [None if old is None else float(old[0, -1]) for old in olds] == [ratio_from] * updates


@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_are_scored_as_they_leave_the_engine_by_roles_whose_weights_stand_still(staleness):
    """The reference always; the critic only while nothing is trained beside the sampling."""
    roles = fake_roles()
    run(settings(steps=3, staleness=staleness), roles)
    assert roles.reference.scored == 0 and roles.reference.scored_early >= 24
    assert (roles.critic.scored, roles.critic.scored_early) == ((3, 0) if staleness else (0, 24))


def test_the_critic_warms_up_while_the_actor_is_frozen():
    roles = fake_roles()
    _, recorder = run(settings(steps=5, critic_warmup=2), roles)
    assert (roles.actor.updates, roles.critic.updates) == (3 * 4, 5 * 4)
    assert ["actor/loss" in metrics for metrics in recorder.metrics] == [False, False, True, True, True]


class Doubling(GRPO):
    def next_kl_coef(self, coef, metrics, num_sequences):
        assert num_sequences == 8 and "actor/loss" in metrics
        return 2 * coef


def test_the_controller_runs_once_a_step_and_goes_on_from_a_restored_state():
    rl = settings(steps=3).model_copy(update={"algorithm": Doubling(kl_coef=0.25)})
    _, recorder = run(rl, fake_roles(critic=None))
    assert [m["kl_coef"] for m in recorder.metrics] == [0.25, 0.5, 1.0]
    saved = recorder.states[1]
    assert DriverState.restored(json.loads(json.dumps(saved.plain()))) == saved
    _, rest = run(rl, fake_roles(critic=None, engine=FakeEngine()), start=saved)
    assert [m["kl_coef"] for m in rest.metrics] == [1.0]


def test_a_warming_critic_leaves_the_controller_alone():
    class Both(Doubling):
        def roles(self):
            return frozenset({"critic"})

    rl = settings(steps=3, critic_warmup=2).model_copy(update={"algorithm": Both(kl_coef=0.25)})
    _, recorder = run(rl, fake_roles())
    assert [m["kl_coef"] for m in recorder.metrics] == [0.25, 0.25, 0.25]


def test_several_rewards_are_logged_by_name():
    class Two(FakeReward):
        async def score(self, rollouts):
            return [replace(s, parts={"a": s.reward, "b": 2.0}) for s in await super().score(rollouts)]

    _, recorder = run(settings(steps=1), fake_roles(reward=Two()))
    assert (recorder.metrics[0]["reward/a"], recorder.metrics[0]["reward/b"]) == (0.5, 2.0)


def test_the_statistics_of_the_rewards_go_on_over_a_resume():
    rl = settings(steps=3, shaping={"normalize": "standard"})
    _, whole = run(rl, fake_roles())
    assert whole.states[-1].rewards.count == 3 * 8
    saved = DriverState.restored(json.loads(json.dumps(whole.states[1].plain())))
    _, rest = run(rl, fake_roles(), start=saved)
    assert rest.states[-1] == whole.states[-1]
    assert whole.batches[-1].rewards.tolist() == [0.0, 1.0] * 4  # what is logged is raw
