"""The contract that every file of orchestrator/algorithms/ keeps, whatever it computes."""

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from orchestrator import plugins
from orchestrator.batch import Batch, Experience, PolicyOutput
from orchestrator.collate import take
from orchestrator.minibatch import token_weights
from tests.cases import Case

PACKAGE = "orchestrator.algorithms"
NAN = float("nan")
AGGREGATES = ["token_mean", "sequence_mean", "constant_length"]
PLAIN: dict[str, object] = {"kl_coef": 0.0}
KL_IN_LOSS = {"kl_coef": 0.1, "kl_in": "loss", "kl_estimator": "k3", "kl_weighted": True}
KL_IN_REWARD = {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"}
SETTINGS = [
    PLAIN,
    {**KL_IN_LOSS, "correction": {"rule": "sequence_mask", "low": 0.6, "high": 1.7}, "entropy_coef": 0.01},
    {**KL_IN_REWARD, "correction": {"rule": "token", "high": 1.2}},
]


@pytest.fixture(params=plugins.names(PACKAGE))
def family(request):
    return plugins.find(PACKAGE, request.param).CONFIG


@pytest.fixture(params=SETTINGS, ids=["plain", "kl_in_loss", "kl_in_reward"])
def algorithm(request, family):
    return family.model_validate(request.param)


def case_of(seed=0, rows=24, columns=9) -> Case:
    return Case(np.random.default_rng(seed), rows, columns)


def clean(case: Case) -> Case:
    """0 in place of NaN off the mask."""
    for name in ("old", "logp", "rollout", "ref", "values", "new_values", "entropy"):
        setattr(case, name, getattr(case, name).nan_to_num())
    return case


def gradient(algorithm, experience: Experience, case: Case, aggregate="token_mean", parts=None):
    """[B, T] of the loss of one optimizer step, summed over the parts that the rows are cut into."""
    weights = token_weights(experience.action_mask, aggregate, 16)
    logprobs = case.logp.clone().requires_grad_()
    for part in parts or [torch.arange(len(weights))]:
        piece = take(experience, part)
        width = piece.tokens.shape[1]
        entropy = case.entropy[part, :width] if algorithm.wants_entropy else None
        output = PolicyOutput(logprobs=logprobs[part, :width], entropy=entropy)
        (weights[part, :width] * algorithm.policy_loss(output, piece).values).sum().backward()
    return logprobs.grad


def permuted(record, order):
    """The same rows in another order."""
    columns = {f.name: getattr(record, f.name) for f in fields(record)}
    return replace(record, **{k: v[order] for k, v in columns.items() if isinstance(v, torch.Tensor)})


def padded(record, extra):
    """More columns on the right, full of NaN where a number may be one."""
    changed = {}
    for field in fields(record):
        column = getattr(record, field.name)
        if isinstance(column, torch.Tensor) and column.dim() == 2:
            fill = NAN if column.is_floating_point() else 0
            changed[field.name] = torch.nn.functional.pad(column, (0, extra), value=fill)
    return replace(record, **changed)


def whole_groups(parts, groups):
    """The same parts, every group where its first row is."""
    cut = [torch.isin(groups, groups[part]).nonzero().squeeze(1) for part in parts]
    taken, whole = set(), []
    for rows in cut:
        mine = [row for row in rows.tolist() if int(groups[row]) not in taken]
        taken |= {int(groups[row]) for row in mine}
        whole += [torch.tensor(mine)] if mine else []
    return whole


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 1 / 3, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_of_equal_rewards_have_exactly_no_gradient(family, reward, dtype):
    if not family.compares_siblings:
        pytest.skip("it does not compare siblings")
    algorithm = family.model_validate(PLAIN)
    case = Case(np.random.default_rng(0), 21, 6, group_size=3, dtype=dtype)
    batch = replace(case.batch(), rewards=torch.full((21,), reward, dtype=dtype))
    experience, metrics = algorithm.experience(batch, {"actor": case.old, "reference": case.ref}, 0.0)
    assert (experience.advantages == 0).all() and metrics["groups_without_signal"] == 1
    assert (gradient(algorithm, experience, case) == 0).all()


def test_one_flat_group_among_others_has_exactly_no_gradient(family):
    if not family.compares_siblings:
        pytest.skip("it does not compare siblings")
    algorithm = family.model_validate(PLAIN)
    case = case_of()
    flat = case.groups == case.groups[0]
    rewards = torch.randn(24, dtype=torch.float64).where(~flat, 0.1)
    experience, _ = algorithm.experience(replace(case.batch(), rewards=rewards), case.scores(), 0.0)
    grad = gradient(algorithm, experience, case)
    assert (grad[flat] == 0).all() and grad.abs().sum() > 0


def test_equal_rewards_give_finite_numbers_without_siblings_too(algorithm):
    case = case_of()
    batch = replace(case.batch(), rewards=torch.full((24,), 0.1, dtype=torch.float64))
    experience, metrics = algorithm.experience(batch, case.scores(), 0.1)
    assert torch.isfinite(experience.advantages).all() and np.isfinite(list(metrics.values())).all()
    assert torch.isfinite(gradient(algorithm, experience, case)).all()


def test_everything_is_zero_off_the_mask(algorithm):
    case = case_of()
    experience, _ = algorithm.experience(case.batch(), case.scores(), 0.1)
    off = ~case.mask
    assert (experience.advantages[off] == 0).all()
    if experience.returns is not None:
        assert (experience.returns[off] == 0).all()
    output = PolicyOutput(logprobs=case.logp, entropy=case.entropy if algorithm.wants_entropy else None)
    loss = algorithm.policy_loss(output, experience)
    assert all((figure[off] == 0).all() for figure in (loss.values, *loss.metrics.values()))
    assert (gradient(algorithm, experience, case)[off] == 0).all()


def test_token_wise_losses_and_no_others_know_their_gradient_from_the_token_alone(algorithm):
    """Every second token's log-prob and entropy are not known yet: 0, as ``vocabulary.BlockedLoss`` asks. So
    with scores from before the step, and as the only update, where the log-probs are their own."""
    case = clean(case_of())
    experience, _ = algorithm.experience(case.batch(), case.scores(), 0.1)
    known = case.mask & (torch.arange(9) % 2 == 0)
    alike = []
    for part in (experience, replace(experience, old_logprobs=None)):
        found = []
        for seen in (case.mask, known):
            read = [x.where(seen, 0.0).requires_grad_() for x in (case.logp, case.entropy)]
            output = PolicyOutput(logprobs=read[0], entropy=read[1] if algorithm.wants_entropy else None)
            total = algorithm.policy_loss(output, part).values.sum()
            slopes = torch.autograd.grad(total, read, allow_unused=True, materialize_grads=True)
            found.append([slope[known] for slope in slopes])
        alike.append(all(torch.equal(whole, alone) for whole, alone in zip(*found, strict=True)))
    assert all(alike) == algorithm.loss_is_token_wise


def test_nan_at_a_masked_slot_changes_nothing(algorithm):
    """Bit by bit, in log-probs, values, rollout log-probs, entropy and the rewards of empty responses."""
    dirty, tidy = case_of(), clean(case_of())
    assert dirty.logp.isnan().any() and not tidy.logp.isnan().any()
    empty = ~dirty.mask.any(1)
    assert empty.any()
    zeros = replace(tidy.batch(), rewards=tidy.rewards.where(~empty, 0.0))
    a, seen = algorithm.experience(dirty.batch(), dirty.scores(), 0.1)
    b, expected = algorithm.experience(zeros, tidy.scores(), 0.1)
    assert torch.equal(a.advantages, b.advantages) and seen == expected
    assert torch.equal(gradient(algorithm, a, dirty), gradient(algorithm, b, tidy))


def test_padding_changes_nothing(algorithm):
    case = case_of()
    wide_scores = {k: torch.nn.functional.pad(v, (0, 70), value=NAN) for k, v in case.scores().items()}
    narrow, _ = algorithm.experience(case.batch(), case.scores(), 0.1)
    wide, _ = algorithm.experience(padded(case.batch(), 70), wide_scores, 0.1)
    torch.testing.assert_close(wide.advantages[:, :9], narrow.advantages, rtol=1e-12, atol=1e-12)
    assert (wide.advantages[:, 9:] == 0).all()
    expected = gradient(algorithm, narrow, case)
    case.logp, case.entropy = (
        torch.nn.functional.pad(x, (0, 70), value=NAN) for x in (case.logp, case.entropy)
    )
    ours = gradient(algorithm, wide, case)
    torch.testing.assert_close(ours[:, :9], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_order_of_rows_and_names_of_groups_change_nothing(algorithm, aggregate):
    case = case_of()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    renamed = (case.groups.max() - case.groups)[order]
    straight, _ = algorithm.experience(case.batch(), case.scores(), 0.1)
    batch: Batch = replace(permuted(case.batch(), order), groups=renamed)
    mixed, _ = algorithm.experience(batch, {k: v[order] for k, v in case.scores().items()}, 0.1)
    expected = gradient(algorithm, straight, case, aggregate)[order]
    case.logp, case.entropy = case.logp[order], case.entropy[order]
    ours = gradient(algorithm, mixed, case, aggregate)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("cuts", [[1], [8, 16], [3, 4, 11, 20], list(range(1, 24))])
def test_ranks_and_micro_batches_do_not_show_in_the_gradient(algorithm, aggregate, cuts):
    case = case_of()
    experience, _ = algorithm.experience(case.batch(), case.scores(), 0.1)
    whole = gradient(algorithm, experience, case, aggregate)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    parts = [order[a:b] for a, b in pairwise([0, *cuts, 24])]
    if algorithm.steps_on_groups:
        parts = whole_groups(parts, case.groups)
    split = gradient(algorithm, experience, case, aggregate, parts)
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-12)
    assert whole.abs().sum() > 0


def test_the_only_gradient_is_that_of_the_policys_output(algorithm):
    """Scores that still hang on a graph get none, nor do figures carry one."""
    case = case_of()
    scores = {name: score.clone().requires_grad_() for name, score in case.scores().items()}
    experience, _ = algorithm.experience(case.batch(), scores, 0.1)
    logprobs, entropy = case.logp.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    output = PolicyOutput(logprobs=logprobs, entropy=entropy if algorithm.wants_entropy else None)
    loss = algorithm.policy_loss(output, experience)
    loss.values.sum().backward()
    assert logprobs.grad.abs().sum() > 0
    assert [name for name, score in scores.items() if score.grad is not None] == []
    assert (entropy.grad is not None) == algorithm.wants_entropy
    assert not any(figure.requires_grad for figure in loss.metrics.values())


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
def test_empty_responses_contribute_nothing_and_shift_no_baseline(algorithm, aggregate):
    case = case_of()
    there = case.mask.any(1).nonzero().squeeze(1)
    assert len(there) < 24
    wild = replace(case.batch(), rewards=case.rewards.where(case.mask.any(1), 1e6))
    with_empty, _ = algorithm.experience(wild, case.scores(), 0.1)
    without, _ = algorithm.experience(
        permuted(case.batch(), there), {k: v[there] for k, v in case.scores().items()}, 0.1
    )
    torch.testing.assert_close(with_empty.advantages[there], without.advantages, rtol=1e-12, atol=1e-12)
    ours = gradient(algorithm, with_empty, case, aggregate)
    assert (ours[~case.mask.any(1)] == 0).all()
    case.logp, case.entropy = case.logp[there], case.entropy[there]
    expected = gradient(algorithm, without, case, aggregate)
    torch.testing.assert_close(ours[there], expected, rtol=1e-10, atol=1e-12)


def test_a_batch_without_any_action_is_finite(algorithm):
    case = case_of()
    case.mask = torch.zeros_like(case.mask)
    experience, metrics = algorithm.experience(case.batch(), case.scores(), 0.1)
    assert (experience.advantages == 0).all() and np.isfinite(list(metrics.values())).all()
    assert (gradient(algorithm, experience, case) == 0).all()


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
def test_weights_sum_to_one_over_the_global_step(aggregate):
    for seed in range(20):
        weights = token_weights(case_of(seed, 64, 33).mask, aggregate)
        assert weights.double().sum().item() == pytest.approx(1.0, abs=1e-6)
