"""CISPO (MiniMax-M1, arXiv:2506.13585 eq. 4 and 5): the importance weight is clipped, the gradient is not.

-sg(clip(ratio)) A log p: rare tokens that make a response turn keep their gradient, which PPO's clip would
drop. The paper bounds the weight from above only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveFloat

from orchestrator.algorithms._groups import GroupAlgorithm
from orchestrator.batch import Experience, Loss
from orchestrator.estimators import group_normalised
from orchestrator.settings import Aggregate, Fraction
from orchestrator.surrogate import ratios

if TYPE_CHECKING:
    from torch import Tensor


class CISPO(GroupAlgorithm):
    """Policy gradient with clipped importance weights, token mean."""

    name: ClassVar[str] = "cispo"
    token_wise: ClassVar[bool] = True
    aggregate: ClassVar[Aggregate] = "token_mean"

    clip_low: Fraction = 1.0
    """The weight is at least 1 - clip_low; 1 is no bound."""
    clip_high: PositiveFloat = 2.0
    """The weight is at most 1 + clip_high."""
    std_eps: PositiveFloat = 1e-6
    """Added to the standard deviation."""

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        return group_normalised(rewards, groups, valid, eps=self.std_eps)

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        mask = part.action_mask
        ratio = ratios(logprobs, old, part).detach()
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = -weight * part.advantages.where(mask, 0.0) * logprobs.where(mask, 0.0)
        return Loss(values=loss, metrics={"clip_fraction": (weight != ratio).to(loss.dtype)})


CONFIG = CISPO
