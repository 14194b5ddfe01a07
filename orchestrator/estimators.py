"""Pure tensor functions that algorithms are made of: KL, advantages, whitening, masked means.

Tensor methods only, no torch import, so that the configuration tree that holds the algorithms loads in a
moment. ``mask`` is always the action mask, [B, T] bool. A value under a False mask never reaches a result,
whatever it is, NaN included (BUGS B1, C5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: KLEstimator) -> Tensor:
    """[B, T] estimate of KL(policy || reference) from one sample per position; 0 off the mask.

    With d = log p - log q (joschu.net/blog/kl-approx.html): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    Not clamped: a clamp kills the gradient exactly where the drift is large (BUGS B13; OpenRLHF clamps to
    +-10).
    """
    d = (logprobs - ref_logprobs).where(mask, 0.0)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    return (-d).exp() - 1 + d


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Scalar mean over the mask; 0 where nothing is masked in."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """[B, T] shifted and scaled to mean 0, biased variance 1 over the mask of the whole batch; 0 off the
    mask.

    The variance is the biased one, as in OpenRLHF; verl and SkyRL divide by n - 1. A constant input gives 0.
    """
    kept = values.where(mask, 0.0)
    count = mask.sum().clamp(min=1)
    centred = (kept - kept.sum() / count).where(mask, 0.0)
    return centred * (centred.square().sum() / count + eps).rsqrt()


def token_rewards(rewards: Tensor, token_penalty: Tensor, mask: Tensor) -> Tensor:
    """[B] sequence rewards on the last action token, minus a [B, T] penalty on every action token.

    A sequence without action tokens gets none (FAULTS 23).
    """
    counted = mask.cumsum(1)
    last = mask & (counted == counted[:, -1:])
    return rewards[:, None].where(last, 0.0) - token_penalty.where(mask, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438 eq. 16) -> (advantages, returns), [B, T], 0 off the
    mask.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V.
    The step after an action is the next *action*: tokens that the policy did not choose, between two turns,
    are skipped and not counted as steps (BUGS B2; OpenRLHF decays once for each of them). The value after the
    last action is 0: a sequence is an episode, also one that was cut at max_new_tokens.

    lam = 1 is the Monte Carlo return minus the value, lam = 0 the one-step TD error.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    next_value = next_advantage = values.new_zeros(len(values))
    columns = []
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t].where(here, next_value)
        next_advantage = advantage.where(here, next_advantage)
        columns.append(next_advantage.where(here, 0.0))
    advantages = values.new_empty(values.shape)
    for t, column in enumerate(reversed(columns)):
        advantages[:, t] = column
    return advantages, (advantages + values).where(mask, 0.0)


def group_advantages(
    rewards: Tensor, groups: Tensor, valid: Tensor, *, divide_by_std: bool, eps: float
) -> Tensor:
    """[B] reward minus the mean of its group, divided by the group's unbiased standard deviation if asked.

    GRPO, arXiv:2402.03300 section 4.1.2. ``valid`` [B] leaves sequences without action tokens out of the
    statistics (OpenRLHF#1239 lets them shift the baseline); they get 0. A group of one, or of equals, gets 0:
    never NaN (BUGS B8).
    """
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    zeros = rewards.new_zeros(num_groups)
    kept = rewards.where(valid, 0.0)
    size = zeros.index_add(0, groups, valid.to(rewards.dtype))
    mean = zeros.index_add(0, groups, kept) / size.clamp(min=1)
    centred = (rewards - mean[groups]).where(valid, 0.0)
    if not divide_by_std:
        return centred
    variance = zeros.index_add(0, groups, centred.square()) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)[groups]
