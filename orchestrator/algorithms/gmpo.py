"""Geometric-mean policy optimisation (arXiv:2507.20673 eq. 4): the geometric mean of a response's token
ratios, each clipped in log space first.

An outlier token moves a geometric mean little, so the clip can be wide. Unlike GSPO's, the clip is the
token's. The loss of a response is one number; each token carries it, and the sequence mean takes it once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveFloat

from orchestrator.algorithms._groups import GroupAlgorithm
from orchestrator.batch import Experience, Loss
from orchestrator.estimators import group_normalised
from orchestrator.settings import Aggregate
from orchestrator.surrogate import log_ratios, sequence_mean

if TYPE_CHECKING:
    from torch import Tensor


class GMPO(GroupAlgorithm):
    """Geometric mean of clipped ratios over advantages normalised within each prompt's group."""

    name: ClassVar[str] = "gmpo"
    aggregate: ClassVar[Aggregate] = "sequence_mean"

    clip_low: PositiveFloat = 0.4
    """A token's log ratio counts down to -clip_low."""
    clip_high: PositiveFloat = 0.4
    """A token's log ratio counts up to clip_high."""
    std_eps: PositiveFloat = 1e-6
    """Added to the standard deviation."""

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        return group_normalised(rewards, groups, valid, eps=self.std_eps)

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        advantages = part.advantages.where(part.action_mask, 0.0)
        moved = log_ratios(logprobs, old, part)
        bounded = moved.clamp(-self.clip_low, self.clip_high)
        pessimistic = moved.minimum(bounded).where(advantages > 0, moved.maximum(bounded))
        loss = -sequence_mean(pessimistic, part).exp() * advantages
        clipped = (pessimistic != moved).to(loss.dtype).detach()
        return Loss(values=loss, metrics={"clip_fraction": clipped})


CONFIG = GMPO
