"""Group-relative policy optimisation (arXiv:2402.03300 section 4.1): siblings of a prompt are each other's
baseline.

No critic. The KL to the reference is a term of the loss (k3), not of the reward; every sequence weighs the
same (eq. 3). The standard deviation is the unbiased one, as in every peer; a group without signal gets
exactly 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import NonNegativeFloat, PositiveFloat

from orchestrator.algorithms._groups import ClippedGroupAlgorithm
from orchestrator.estimators import group_centred, group_normalised
from orchestrator.settings import Aggregate

if TYPE_CHECKING:
    from torch import Tensor


class GRPO(ClippedGroupAlgorithm):
    """Clipped policy loss over advantages normalised within each prompt's group."""

    name: ClassVar[str] = "grpo"
    aggregate: ClassVar[Aggregate] = "sequence_mean"

    kl_coef: NonNegativeFloat = 0.001
    """Weight of the KL to the reference, at the start; 0 runs without a reference (the paper's is 0.04)."""
    divide_by_std: bool = True
    """Divide by the group's standard deviation; false keeps the scale of the rewards."""
    std_eps: PositiveFloat = 1e-6
    """Added to the standard deviation (verl, SkyRL 1e-6; TRL 1e-4; OpenRLHF 1e-9)."""

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        if not self.divide_by_std:
            return group_centred(rewards, groups, valid)
        return group_normalised(rewards, groups, valid, eps=self.std_eps)


CONFIG = GRPO
