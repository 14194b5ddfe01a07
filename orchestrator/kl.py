"""How far the policy is from another one: estimates per token, and controllers of the penalty's weight.

Two places, two gradients. *In the reward* an estimate is a number and its mean is what counts: k1 and the
whole distribution are unbiased. *In the loss* its gradient counts: that of a plain k1 is zero in expectation
(BUGS B12), so it is refused there; k2's is the KL's own when the tokens come from the policy itself; k3's is
that of another divergence (arXiv:2402.03300 uses it nevertheless). ``weighted`` multiplies an estimate by the
ratio to the policy that drew the token, through which the gradient then flows: unbiased in value and in
gradient, for k1 and k3 and after any number of updates (arXiv:2512.02556, section 3.1). k2 is weighted
without a gradient of the ratio: its own is the KL's already, and the other would be added to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "full"]
Controller = Literal["fixed", "proportional", "doubling"]


def kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Estimator) -> Tensor:
    """[B, T] estimate of KL(policy || reference) from one sample per position; 0 off the mask.

    With d = log p - log q (joschu.net/blog/kl-approx.html): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    Not clamped: a clamp kills the gradient exactly where the drift is large (BUGS B13; OpenRLHF clamps to
    +-10, verl and SkyRL k3 to 10).
    """
    d = (logprobs - ref_logprobs).where(mask, 0.0)
    match estimator:
        case "k1":
            return d
        case "k2":
            return d * d / 2
        case "k3":
            return (-d).exp() - 1 + d
        case _:
            raise ValueError(f"kl_estimator={estimator} needs whole distributions: see full_kl")


def full_kl(distribution: Tensor, ref_distribution: Tensor, mask: Tensor) -> Tensor:
    """[B, T] the KL itself, summed over the vocabulary, from [B, T, V] log-probs; 0 off the mask."""
    there = mask[..., None]
    logp = distribution.where(there, 0.0)
    return (logp.exp() * (logp - ref_distribution.where(there, 0.0))).sum(-1).where(mask, 0.0)


def next_coef(
    coef: float, measured: float, num_sequences: int, rule: Controller, target: float, horizon: float
) -> float:
    """The weight of the penalty after a step that measured this KL.

    proportional: coef * (1 + clip(measured / target - 1, +-0.2) * num_sequences / horizon)
                  (arXiv:1909.08593, section 2.2)
    doubling:     halved below target / 1.5, doubled above 1.5 target (arXiv:1707.06347, section 4)
    """
    match rule:
        case "proportional":
            error = min(max(measured / target - 1, -0.2), 0.2)
            return coef * (1 + error * num_sequences / horizon)
        case "doubling":
            if measured < target / 1.5:
                return coef / 2
            return coef * 2 if measured > target * 1.5 else coef
        case _:
            return coef
