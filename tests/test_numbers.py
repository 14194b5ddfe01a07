"""Numbers that are not finite cost their step and nothing else; and why log-probs of two ends differ."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from actors.training_state import all_finite
from launch.dump import MOST, dump
from orchestrator.filters import GroupFilter
from orchestrator.mismatch import mismatch_cause
from orchestrator.numbers import NonFiniteError, Patience, non_finite
from orchestrator.shaping import RunningStats
from tests.cases import cases
from tests.fakes import FakeEngine, FakeLearner, FakeReward
from tests.test_loop import fake_roles, run, settings


def broken_once(column, value):
    """Roles of which one gives ``value`` once, on the action mask, for the first sample of the run."""
    first = []

    class Learner(FakeLearner):
        async def score_rollouts(self, rollouts):
            answers = await super().score_rollouts(rollouts)
            for rollout, answer in zip(rollouts, answers, strict=True):
                if rollout.uid == first[0]:
                    answer[-1] = value
            return answers

    class Engine(FakeEngine):
        async def generate(self, p, num_samples, sampling):
            rollouts = await super().generate(p, num_samples, sampling)
            first.append(rollouts[0].uid)
            if column == "rollout_logprobs" and rollouts[0].uid == first[0]:
                rollouts[0] = replace(rollouts[0], logprobs=(*rollouts[0].logprobs[:-1], value))
            return rollouts

    class Reward(FakeReward):
        async def score(self, rollouts):
            scored = await super().score(rollouts)
            if column == "rewards":
                scored = [replace(s, reward=value) if s.rollout.uid == first[0] else s for s in scored]
            return scored

    learner = {column: Learner()} if column in ("actor", "critic", "reference") else {}
    return fake_roles(engine=Engine(), reward=Reward(), **learner)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["rewards", "rollout_logprobs", "actor", "critic", "reference"])
def test_a_number_that_is_not_finite_costs_one_step_and_reaches_no_learner(column, value):
    """FAULTS 20; BUGS B16."""
    roles = broken_once(column, value)
    ledger, recorder = run(settings(steps=3, shaping={"normalize": "standard"}), roles)
    assert recorder.metrics[0]["skipped_steps"] == 1.0
    assert recorder.metrics[0][f"non_finite/{column}"] == 1.0
    assert roles.actor.updates == roles.critic.updates == 2 * 2 * 2  # steps 2 and 3
    assert recorder.states[0].rewards == RunningStats() and recorder.states[0].kl_coef == 0.1
    assert math.isfinite(recorder.states[2].rewards.mean) and recorder.states[2].rewards.count == 16
    assert ["skipped_steps" in m for m in recorder.metrics] == [True, False, False]
    assert len(ledger.history) == 3 * 4  # the skipped step's prompts are used up, once
    assert roles.engine.version == 3


def test_numbers_off_the_mask_do_not_count():
    case = next(c for c in cases([(8, 6)] * 20, torch.float32) if not c.mask.all() and c.mask.any(1).all())
    batch, scores = case.batch(), case.scores()  # NaN off the mask
    assert non_finite(batch, scores) == {}
    row, column = case.mask.nonzero()[0].tolist()
    scores["critic"][row, column] = math.inf
    assert non_finite(batch, scores) == {"non_finite/critic": 1.0}


def test_a_group_with_a_reward_that_is_not_finite_is_not_filtered_away():
    strict = GroupFilter(above=0.0, below=1.0)
    assert strict.keeps([math.nan, 5.0]) and strict.keeps([math.inf, math.inf])
    assert not strict.keeps([5.0, 6.0])


def test_too_many_skipped_steps_end_the_run():
    patience = Patience(1000)
    bad, good = {"actor/skipped_steps": 0.25}, {"actor/skipped_steps": 0.0}
    assert [patience.seen(m, 1) for m in (bad, bad, bad, good, bad)] == [True, True, True, False, True]
    assert patience.seen(bad, 2) and patience.seen(bad, 3)
    with pytest.raises(NonFiniteError, match=r"step 4 is the 4\. in a row and the 7\. in all"):
        patience.seen(bad, 4)
    patience = Patience(1000)
    for step in range(10):
        assert patience.seen(bad, step) and not patience.seen(good, step)
    with pytest.raises(NonFiniteError, match=r"the 11\. in all .* 10 in all are allowed"):
        patience.seen(bad, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000])  # of a vector register and beside it
def test_one_number_that_is_not_finite_is_found_wherever_it_lies(dtype, length):
    largest = torch.full((length,), torch.finfo(dtype).max, dtype=dtype)
    sound = [largest, torch.zeros(0), -largest.view(1, length)]
    assert all_finite(sound) and all_finite([]) and all_finite([torch.zeros(0)])
    for value in (math.nan, math.inf, -math.inf):
        for place in {0, length // 2, length - 1}:
            broken = torch.zeros(length, dtype=dtype)
            broken[place] = value
            assert not all_finite([*sound, broken])


def test_a_batch_that_was_skipped_is_kept_with_its_numbers(tmp_path):
    _, recorder = run(settings(steps=1), broken_once("rewards", math.nan))
    batch = recorder.batches[0]
    where = dump(tmp_path / "d", 1, batch, recorder.metrics[0], ["a", "b"])
    columns = load_file(where / "batch.safetensors")
    assert torch.equal(columns["tokens"], batch.tokens) and columns["rewards"].isnan().sum() == 1
    assert json.loads((where / "why.json").read_text())["metrics"]["non_finite/rewards"] == "1.0"
    for step in range(2, MOST + 5):
        dump(tmp_path / "d", step, batch, {}, [])
    assert len(list((tmp_path / "d").iterdir())) == MOST


# log-probs of engine and trainer


def sampled(*, engine_temperature=1.0, noise=0.0, kept=None, seed=0):
    """(trainer [B, T], batch): tokens drawn from logits of 50 words by an engine with these settings, and
    their log-probs at temperature 1."""
    torch.manual_seed(seed)
    logits = torch.randn(16, 40, 50, dtype=torch.float64) * 2
    drawn_from = logits / engine_temperature
    if kept is not None:  # top-p: what is outside the most likely words cannot be drawn
        threshold = drawn_from.topk(kept).values[..., -1:]
        drawn_from = drawn_from.masked_fill(drawn_from < threshold, -math.inf)
    engine = drawn_from.log_softmax(-1)
    tokens = torch.distributions.Categorical(logits=drawn_from).sample()
    rollout = engine.gather(-1, tokens[..., None]).squeeze(-1)
    trainer = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    batch = replace(
        cases([(16, 40)], torch.float64)[0].batch(),
        action_mask=torch.ones(16, 40, dtype=torch.bool),
        rollout_logprobs=rollout + noise * torch.randn(16, 40, dtype=torch.float64),
        versions=torch.full((16, 40), 5),
        tokens=tokens,
    )
    return trainer, batch


def cause(trainer, batch, *, probe_diff=0.0):
    mean = float((trainer - batch.rollout_logprobs).abs().mean())
    return mismatch_cause(trainer, batch, version=5, mean=mean, tolerance=1e-3, probe_diff=probe_diff)


@pytest.mark.parametrize("seed", range(5))
def test_the_cause_of_a_mismatch_is_named(seed):
    assert cause(*sampled(noise=1e-5, seed=seed)) is None
    assert cause(*sampled(noise=0.3, seed=seed)) == "numerics"
    assert cause(*sampled(noise=0.3, seed=seed), probe_diff=0.2) == "weights"
    assert cause(*sampled(engine_temperature=0.7, noise=1e-5, seed=seed)) == "sampling"
    assert cause(*sampled(engine_temperature=1.3, noise=0.02, seed=seed)) == "sampling"
    assert cause(*sampled(kept=10, noise=1e-5, seed=seed)) == "sampling"


def test_old_tokens_that_differ_beside_fresh_ones_that_do_not_are_stale():
    trainer, batch = sampled(noise=1e-5)
    batch.versions[:, 20:] = 4
    moved = trainer.clone()
    moved[:, 20:] += 0.2 * torch.randn(16, 20)
    assert cause(moved, batch) == "staleness"
    moved[:, :20] += 0.2 * torch.randn(16, 20)
    assert cause(moved, batch) == "numerics"  # fresh tokens differ too
    assert mismatch_cause(None, batch, version=6, mean=1.0, tolerance=0.1, probe_diff=0.0) == "staleness"


def test_the_loop_names_the_cause_and_is_silent_in_range():
    _, recorder = run(settings(steps=1), fake_roles())
    assert not [name for name in recorder.metrics[0] if name.startswith("mismatch/")]

    class Other(FakeLearner):
        async def score_rollouts(self, rollouts):
            return [score - 2.0 for score in await super().score_rollouts(rollouts)]

    _, recorder = run(settings(steps=1), fake_roles(actor=Other()))
    assert recorder.metrics[0]["mismatch/sampling"] == 1.0
