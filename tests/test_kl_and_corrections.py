"""KL gradients by enumeration, controllers, weights of stale rollouts, by hand."""

from dataclasses import replace
from math import exp, log

import pytest
import torch
from pydantic import ValidationError

from orchestrator.algorithms.grpo import GRPO
from orchestrator.algorithms.ppo import PPO
from orchestrator.batch import Experience, PolicyOutput
from orchestrator.corrections import Correction
from orchestrator.filters import GroupFilter

REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
LOGITS = torch.tensor([0.4, -1.0, 0.3], dtype=torch.float64)
ELSEWHERE = torch.tensor([-0.5, 0.2, 0.1], dtype=torch.float64)  # logits of a policy that was left


def tokens_of(**columns) -> Experience:
    """One response of as many tokens as the columns have."""
    width = len(columns["old_logprobs"])
    nothing = torch.zeros(1, width, dtype=torch.float64)
    given = {name: torch.as_tensor(column, dtype=torch.float64)[None] for name, column in columns.items()}
    empty = dict.fromkeys(("old_values", "returns", "ref_logprobs"))
    return Experience(
        **{"rollout_logprobs": nothing, "advantages": nothing, **empty, **given},
        tokens=torch.zeros(1, width, dtype=torch.int64), kl_coef=1.0,
        attention_mask=torch.ones(1, width, dtype=torch.bool),
        action_mask=torch.ones(1, width, dtype=torch.bool),
    )  # fmt: skip


def true_gradient():
    """Of KL(softmax(logits) || reference), by hand: p_i (log p_i - log q_i - KL)."""
    logp = LOGITS.log_softmax(0)
    gap = logp - REFERENCE
    return (logp.exp() * (gap - (logp.exp() * gap).sum())).tolist()


def expected_gradient(estimator, sampled_from, *, weighted=False):
    """What the loss's KL term has for a gradient on average: every token of the vocabulary once, each
    weighing its probability under the policy that draws."""
    logits = LOGITS.clone().requires_grad_()
    logprobs, old = logits.log_softmax(0), sampled_from.log_softmax(0)
    config = GRPO(kl_coef=1.0, kl_estimator=estimator, kl_weighted=weighted)
    part = tokens_of(old_logprobs=old, ref_logprobs=REFERENCE)
    loss = config.policy_loss(PolicyOutput(logprobs=logprobs[None], entropy=None), part)
    (loss.values[0] * old.exp()).sum().backward()
    return logits.grad.tolist()


@pytest.mark.parametrize(("estimator", "weighted"), [("k2", False), ("k1", True), ("k2", True), ("k3", True)])
def test_the_gradient_in_the_loss_is_that_of_the_kl(estimator, weighted):
    assert expected_gradient(estimator, LOGITS, weighted=weighted) == pytest.approx(true_gradient())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_weighted_it_is_that_of_the_kl_after_the_policy_has_moved(estimator):
    assert expected_gradient(estimator, ELSEWHERE, weighted=True) == pytest.approx(true_gradient())


def test_unweighted_k2_is_not_after_the_policy_has_moved():
    assert expected_gradient("k2", ELSEWHERE) != pytest.approx(true_gradient(), rel=0.05)


def test_plain_k3_has_the_gradient_of_the_other_divergence():
    """E_p[(1 - q/p) grad log p]: that of KL(reference || policy), which is p - q on the logits."""
    ours = expected_gradient("k3", LOGITS)
    assert ours == pytest.approx((LOGITS.softmax(0) - REFERENCE.exp()).tolist())
    assert ours != pytest.approx(true_gradient(), rel=0.05)


def test_the_whole_distribution_has_the_gradient_of_the_kl_wherever_the_token_came_from():
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    part = tokens_of(old_logprobs=[-1.0], ref_logprobs=[-1.0], ref_distribution=REFERENCE[None])
    output = PolicyOutput(logprobs=logprobs[None, :1], entropy=None, distribution=logprobs[None, None])
    loss = GRPO(kl_coef=1.0, kl_estimator="full").policy_loss(output, part)
    p, q = LOGITS.softmax(0).tolist(), REFERENCE.exp().tolist()
    assert loss.values.item() == pytest.approx(sum(a * log(a / b) for a, b in zip(p, q, strict=True)))
    loss.values.sum().backward()
    assert logits.grad.tolist() == pytest.approx(true_gradient())


def test_plain_k1_in_the_loss_is_refused():
    with pytest.raises(ValidationError, match="kl_estimator=k1 in the loss has a gradient of zero"):
        GRPO(kl_coef=0.1, kl_estimator="k1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"kl_weighted": True, "kl_in": "reward", "kl_coef": 0.1},
            "kl_weighted=true weighs a KL in the loss",
        ),
        ({"kl_controller": "doubling", "kl_coef": 0.0}, "multiplies kl_coef, which is 0 and stays so"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        GRPO(**settings)


def test_penalty_objective_by_hand():
    # ratio e^.5, advantage 2; KL(old || new) from a sample of old: (r - 1) - log r; beta 3
    ppo = PPO(objective="penalty", kl_coef=0.0)
    part = tokens_of(old_logprobs=[-1.5], advantages=[2.0])
    part = replace(part, kl_coef=3.0)
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    loss = ppo.policy_loss(PolicyOutput(logprobs=logprobs, entropy=None), part).values
    r = exp(0.5)
    assert loss.item() == pytest.approx(-2 * r + 3 * (r - 1 - 0.5))
    loss.sum().backward()
    assert logprobs.grad.item() == pytest.approx(-2 * r + 3 * (r - 1))


@pytest.mark.parametrize(
    ("measured", "factor"), [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1), (0.0149, 1), (0.0151, 2), (9.0, 2)]
)
def test_penalty_coefficient_halves_below_target_over_1_5_and_doubles_above_1_5_target(measured, factor):
    ppo = PPO(objective="penalty", step_kl_target=0.01, step_kl_coef=0.4)
    assert ppo.initial_kl_coef == 0.4
    assert ppo.next_kl_coef(0.4, {"actor/approx_kl": measured, "kl": 5.0}, 8) == 0.4 * factor
    assert ppo.next_kl_coef(0.4, {"kl": 5.0}, 8) == 0.4


def test_one_penalty_is_controlled_at_a_time():
    with pytest.raises(ValidationError, match="kl_controller=doubling"):
        PPO(objective="penalty", kl_controller="doubling")


def test_proportional_controller_by_hand():
    # KL .3 at target .1: error 2, clipped to .2; 50 sequences of horizon 1000: 1 + .2 * .05
    ppo = PPO(kl_controller="proportional", kl_target=0.1, kl_horizon=1000)
    assert ppo.next_kl_coef(0.5, {"kl": 0.3}, 50) == pytest.approx(0.505)
    assert ppo.next_kl_coef(0.5, {"kl": 0.09}, 50) == pytest.approx(0.5 * (1 - 0.1 * 0.05))


def test_stale_rollouts_weigh_proximal_over_behaviour_and_clip_around_the_proximal_policy():
    """Decoupled PPO, arXiv:2110.00641 eq. 2: (prox / behave) min(r A, clip(r) A), r = new / prox."""
    behave, proximal, new = [0.5, 0.5, 0.1], [0.25, 0.6, 0.5], [0.5, 0.54, 0.5]
    part = tokens_of(
        rollout_logprobs=[log(p) for p in behave], old_logprobs=[log(p) for p in proximal],
        advantages=[2.0, 3.0, -1.0],
    )  # fmt: skip
    config = PPO(kl_coef=0.0, correction=Correction(rule="token", high=100))
    logprobs = torch.tensor([[log(p) for p in new]], dtype=torch.float64, requires_grad=True)
    loss = config.policy_loss(PolicyOutput(logprobs=logprobs, entropy=None), part)
    # weights .5, 1.2, 5; ratios 2 (clipped to 1.2), .9, 1
    assert loss.metrics["correction_weight"][0].tolist() == pytest.approx([0.5, 1.2, 5.0])
    assert loss.values[0].tolist() == pytest.approx([-0.5 * 1.2 * 2, -1.2 * 0.9 * 3, 5.0])
    loss.values.sum().backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, -1.2 * 0.9 * 3, 5.0])


def test_the_only_update_of_a_batch_takes_its_own_logprobs_as_proximal():
    part = tokens_of(old_logprobs=[0.0], rollout_logprobs=[log(0.5)], advantages=[1.0])
    part = replace(part, old_logprobs=None)
    config = PPO(kl_coef=0.0, correction=Correction(rule="token"))
    logprobs = torch.tensor([[log(0.25)]], dtype=torch.float64, requires_grad=True)
    config.policy_loss(PolicyOutput(logprobs=logprobs, entropy=None), part).values.sum().backward()
    assert logprobs.grad.item() == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("rule", "kept", "cut"),
    [
        ("token", [2.0, 2.0, 0.25], [0, 1, 0]),
        ("sequence", [(2 * 4 * 0.25) ** (1 / 3)] * 3, [0, 0, 0]),
        ("token_both", [2.0, 2.0, 0.5], [0, 1, 1]),
        ("icepop", [2.0, 0.0, 0.0], [0, 1, 1]),
        ("sequence_mask", [2.0, 4.0, 0.25], [0, 0, 0]),
    ],
)
def test_correction_rules_by_hand(rule, kept, cut):
    # trainer over engine: 2, 4, 1/4; geometric mean 2^(1/3)
    part = tokens_of(
        old_logprobs=[log(0.2), log(0.4), log(0.1)], rollout_logprobs=[log(0.1), log(0.1), log(0.4)],
        advantages=[-1.0] * 3,
    )  # fmt: skip
    config = PPO(kl_coef=0.0, correction=Correction(rule=rule, low=0.5, high=2.0 + 1e-9))
    loss = config.policy_loss(PolicyOutput(logprobs=part.old_logprobs, entropy=None), part)
    assert loss.values[0].tolist() == pytest.approx(kept)
    assert loss.metrics["correction_cut"][0].tolist() == cut


def test_a_response_outside_the_sequence_mask_counts_nothing():
    part = tokens_of(
        old_logprobs=[log(0.9), log(0.9)], rollout_logprobs=[log(0.1), log(0.9)], advantages=[1.0] * 2
    )
    for rule, kept in (("sequence_mask", [0.0, 0.0]), ("sequence", [-2.0, -2.0])):  # geometric mean 3
        config = PPO(kl_coef=0.0, correction=Correction(rule=rule))
        loss = config.policy_loss(PolicyOutput(logprobs=part.old_logprobs, entropy=None), part)
        assert loss.values[0].tolist() == pytest.approx(kept)
        assert loss.metrics["correction_cut"][0].tolist() == [1, 1]


def test_thresholds_the_wrong_way_round_are_refused_by_name():
    with pytest.raises(ValidationError, match=r"correction.low=2.0 must be below correction.high=0.5"):
        Correction(rule="icepop", low=2.0, high=0.5)
    with pytest.raises(ValidationError, match=r"filter.above=0.9 must be below filter.below=0.1"):
        GroupFilter(above=0.9, below=0.1)


def test_group_filter_by_hand():
    assert not GroupFilter().keeps([1.0, 1.0]) and GroupFilter().keeps([1.0, 0.0])
    assert GroupFilter(flat=False).keeps([1.0, 1.0])
    bounds = GroupFilter(above=0.25, below=0.75)
    assert [bounds.keeps([1.0] * n + [0.0] * (4 - n)) for n in range(5)] == [False, False, True, False, False]
