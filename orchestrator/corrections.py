"""The weight of a token that another policy drew: the engine's numerics, or weights some updates old.

Every rule starts from w_t = exp(old - rollout): the trainer's probability of the sampled token over the
engine's. It multiplies the loss, without a gradient of its own. With stale rollouts ``old`` is the policy
just before the step, recomputed: the decoupled PPO objective, whose clip is around the proximal policy and
whose weight joins it to the behaviour policy (arXiv:2110.00641; arXiv:2505.24298).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from orchestrator.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["none", "token", "token_both", "sequence", "icepop", "sequence_mask"]


class Correction(Settings):
    """Importance weights between engine and trainer; off by default."""

    rule: Rule = "none"
    """token: each token's weight, truncated (Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training"). token_both: truncated from below too (OpenRLHF's tis). sequence: one weight
    per response, the geometric mean of its tokens', truncated. icepop: tokens whose weight is outside the
    thresholds count nothing (arXiv:2510.18855). sequence_mask: responses whose geometric mean is outside
    count nothing, the tokens of the others by their own weight (OpenRLHF's seq-mask-tis)."""
    low: NonNegativeFloat = 0.5
    """Smallest weight: token_both raises to it, icepop and sequence_mask drop what is below."""
    high: PositiveFloat = 2.0
    """Largest weight: icepop and sequence_mask drop what is above, the other rules truncate to it."""

    @property
    def reads_responses(self) -> bool:
        """Whether the weight of a token depends on the other tokens of its response."""
        return self.rule in {"sequence", "sequence_mask"}

    @model_validator(mode="after")
    def _ordered(self) -> Correction:
        if self.low >= self.high:
            raise ValueError(f"correction.low={self.low} must be below correction.high={self.high}")
        return self


def correction_weights(
    old: Tensor, rollout: Tensor, mask: Tensor, correction: Correction
) -> tuple[Tensor, dict[str, Tensor]]:
    """[B, T] weights, 0 off the mask, and figures of that shape: the untouched ``correction_weight``, and
    ``correction_cut``, 1.0 where a threshold had its way."""
    log_weight = (old.detach() - rollout).where(mask, 0.0)
    if correction.reads_responses:
        mean = log_weight.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        whole = mean.exp().expand_as(log_weight)
    weight = log_weight.exp()
    low, high = correction.low, correction.high
    match correction.rule:
        case "token":
            shown, kept, cut = weight, weight.clamp(max=high), weight > high
        case "token_both":
            shown, kept, cut = weight, weight.clamp(low, high), (weight < low) | (weight > high)
        case "sequence":
            shown, kept, cut = whole, whole.clamp(max=high), whole > high
        case "icepop":
            cut = (weight < low) | (weight > high)
            shown, kept = weight, weight.where(~cut, 0.0)
        case "sequence_mask":
            cut = (whole < low) | (whole > high)
            shown, kept = whole, weight.where(~cut, 0.0)
        case _:
            raise ValueError("correction.rule=none has no weights")
    figures = {"correction_weight": shown.where(mask, 0.0), "correction_cut": (cut & mask).to(weight.dtype)}
    return kept.where(mask, 0.0), figures
