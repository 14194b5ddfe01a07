"""Advantages, KL and whitening against numbers worked by hand or by a plain float64 loop."""

import math

import pytest
import torch

from orchestrator.estimators import gae, group_centred, group_normalised, token_rewards, whiten
from orchestrator.kl import kl

T, F = True, False
NAN = float("nan")


def t(rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def mask(rows):
    return torch.tensor(rows, dtype=torch.bool)


def gae_by_definition(rewards, values, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, straight from the paper, over the actions only."""
    deltas = [
        r + gamma * (values[i + 1] if i + 1 < len(values) else 0.0) - values[i] for i, r in enumerate(rewards)
    ]
    return [
        sum((gamma * lam) ** (k - i) * deltas[k] for k in range(i, len(deltas))) for i in range(len(deltas))
    ]


def test_gae_by_hand():
    # delta_2 = 1 - .5 = .5; delta_1 = 0 + .9*.5 - .2 = .25; A_1 = .25 + .9*.8*.5 = .61
    advantages, returns = gae(t([[0, 0, 1.0]]), t([[7, 0.2, 0.5]]), mask([[F, T, T]]), gamma=0.9, lam=0.8)
    assert advantages.tolist() == [pytest.approx([0, 0.61, 0.5])]
    assert returns.tolist() == [pytest.approx([0, 0.81, 1.0])]


def test_lambda_one_is_monte_carlo_and_lambda_zero_is_one_step_td():
    rewards, values, m = t([[0.5, 0, 2.0]]), t([[0.1, 0.2, 0.3]]), mask([[T, T, T]])
    monte_carlo, _ = gae(rewards, values, m, gamma=1.0, lam=1.0)
    assert monte_carlo[0].tolist() == pytest.approx([2.5 - 0.1, 2.0 - 0.2, 2.0 - 0.3])
    td, _ = gae(rewards, values, m, gamma=0.5, lam=0.0)
    assert td[0].tolist() == pytest.approx([0.5 + 0.5 * 0.2 - 0.1, 0.5 * 0.3 - 0.2, 2.0 - 0.3])


def test_environment_tokens_between_turns_are_not_steps():
    values, rewards = [0.3, -0.1, 0.6, 0.2], [0.1, 0.0, -0.2, 1.0]
    expected = gae_by_definition(rewards, values, 0.9, 0.7)
    m = mask([[F, T, T, F, F, T, F, T]])
    wide_values, wide_rewards = (
        torch.full((1, 8), 100.0, dtype=torch.float64),
        torch.full((1, 8), 50.0, dtype=torch.float64),
    )
    wide_values[m], wide_rewards[m] = t(values), t(rewards)
    advantages, returns = gae(wide_rewards, wide_values, m, gamma=0.9, lam=0.7)
    assert advantages[m].tolist() == pytest.approx(expected)
    assert returns[m].tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=True)])
    assert advantages[~m].abs().sum() == 0 and returns[~m].abs().sum() == 0


def test_nan_and_padding_under_the_mask_change_nothing():
    m = mask([[F, T, T, F]])
    clean = gae(t([[0, 0, 1, 0]]), t([[0, 0.2, 0.5, 0]]), m, gamma=1.0, lam=0.95)
    dirty = gae(t([[NAN, 0, 1, NAN]]), t([[100, 0.2, 0.5, NAN]]), m, gamma=1.0, lam=0.95)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_whiten_has_mean_zero_and_biased_variance_one_over_the_mask():
    out = whiten(t([[1.0, 3.0, NAN], [5.0, 9.0, 9.0]]), mask([[T, T, F], [T, F, F]]))
    # 1, 3, 5: mean 3, biased variance 8/3
    root = math.sqrt(8 / 3)
    assert out.tolist() == [pytest.approx([-2 / root, 0, 0]), pytest.approx([2 / root, 0, 0])]


def test_whitening_equal_values_gives_zero_not_nan():
    assert whiten(t([[4.0, 4.0]]), mask([[T, T]])).tolist() == [[0, 0]]
    assert whiten(t([[4.0, 4.0]]), mask([[F, F]])).tolist() == [[0, 0]]


def test_kl_estimators_by_hand():
    p, q, m = t([[-1.0, -2.0, NAN]]), t([[-1.5, -1.0, 0]]), mask([[T, T, F]])
    assert kl(p, q, m, "k1")[0].tolist() == pytest.approx([0.5, -1.0, 0])
    assert kl(p, q, m, "k2")[0].tolist() == pytest.approx([0.125, 0.5, 0])
    assert kl(p, q, m, "k3")[0].tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.e - 2, 0])


def test_kl_keeps_its_gradient_at_large_drift():
    for estimator, slope in (("k1", 1.0), ("k2", -14.0), ("k3", 1 - math.exp(14.0))):
        p = t([[-15.0]]).requires_grad_()
        kl(p, t([[-1.0]]), mask([[T]]), estimator).sum().backward()
        assert p.grad.item() == pytest.approx(slope)


def test_the_reward_lands_on_the_last_action_and_the_penalty_on_every_action():
    m = mask([[F, T, T, F], [F, T, F, T], [F, F, F, F]])
    out = token_rewards(t([2.0, 3.0, 5.0]), torch.full((3, 4), 0.5, dtype=torch.float64), m)
    assert out.tolist() == [[0, -0.5, 1.5, 0], [0, -0.5, 0, 2.5], [0, 0, 0, 0]]


def test_advantages_within_a_group_by_hand():
    rewards, groups = t([1.0, 3.0, 10.0, 10.0, 4.0]), torch.tensor([0, 0, 1, 1, 2])
    valid = torch.ones(5, dtype=torch.bool)
    centred = group_centred(rewards, groups, valid)
    assert centred.tolist() == [-1, 1, 0, 0, 0]
    scaled = group_normalised(rewards, groups, valid, eps=1e-6)
    assert scaled.tolist() == pytest.approx([-1 / (math.sqrt(2) + 1e-6), 1 / (math.sqrt(2) + 1e-6), 0, 0, 0])


def test_an_empty_response_does_not_shift_its_siblings_baseline():
    rewards, groups = t([1.0, 3.0, -100.0]), torch.tensor([0, 0, 0])
    out = group_centred(rewards, groups, torch.tensor([T, T, F]))
    assert out.tolist() == [-1, 1, 0]


def test_group_advantages_do_not_depend_on_the_order_of_rows():
    torch.manual_seed(0)
    rewards, groups = torch.randn(12, dtype=torch.float64), torch.tensor([0, 1, 2] * 4)
    valid, order = torch.ones(12, dtype=torch.bool), torch.randperm(12)
    straight = group_normalised(rewards, groups, valid, eps=1e-6)
    shuffled = group_normalised(rewards[order], groups[order], valid, eps=1e-6)
    torch.testing.assert_close(straight[order], shuffled)
