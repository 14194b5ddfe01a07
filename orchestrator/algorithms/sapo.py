"""Soft adaptive policy optimisation (arXiv:2511.20347): a smooth gate on the ratio in place of the clip.

-(4 / tau) sigmoid(tau (ratio - 1)) A: its gradient is the policy gradient's at ratio 1 and fades on both
sides, never to exactly nothing. Negative advantages fade a little faster: they push many tokens up at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveFloat

from orchestrator.algorithms._groups import GroupAlgorithm
from orchestrator.batch import Experience, Loss
from orchestrator.estimators import group_normalised
from orchestrator.settings import Aggregate
from orchestrator.surrogate import ratios

if TYPE_CHECKING:
    from torch import Tensor


class SAPO(GroupAlgorithm):
    """Softly gated ratio over advantages normalised within each prompt's group."""

    name: ClassVar[str] = "sapo"
    token_wise: ClassVar[bool] = True
    aggregate: ClassVar[Aggregate] = "sequence_mean"

    tau_positive: PositiveFloat = 1.0
    """How fast the gate closes for actions better than their group."""
    tau_negative: PositiveFloat = 1.05
    """How fast the gate closes for actions worse than their group."""
    std_eps: PositiveFloat = 1e-6
    """Added to the standard deviation."""

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        return group_normalised(rewards, groups, valid, eps=self.std_eps)

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        advantages = part.advantages.where(part.action_mask, 0.0)
        ratio = ratios(logprobs, old, part)
        positive = (self.tau_positive * (ratio - 1)).sigmoid() * (4 / self.tau_positive)
        negative = (self.tau_negative * (ratio - 1)).sigmoid() * (4 / self.tau_negative)
        return Loss(values=-positive.where(advantages > 0, negative) * advantages, metrics={})


CONFIG = SAPO
