"""REINFORCE++-baseline (arXiv:2501.03262): rewards minus their group's mean, whitened over the whole batch.

The group removes the prompt's difficulty, the batch gives the scale, so that no group of nearly equal rewards
is blown up as in GRPO. The KL is a term of the loss, by k2, whose gradient is that of the KL.

Whitening subtracts the mean over tokens, which is not 0 where good responses are longer than bad ones. A
group of equals is spared that shift, which verl and OpenRLHF give it too: it keeps exactly 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import NonNegativeFloat

from orchestrator.algorithms._base import Advantages
from orchestrator.algorithms._groups import ClippedGroupAlgorithm
from orchestrator.batch import Batch
from orchestrator.estimators import flat_groups, group_centred, whiten
from orchestrator.kl import Estimator

if TYPE_CHECKING:
    from torch import Tensor


class ReinforcePPBaseline(ClippedGroupAlgorithm):
    """Clipped policy loss over group-centred, batch-whitened rewards."""

    name: ClassVar[str] = "reinforce_pp_baseline"

    kl_coef: NonNegativeFloat = 0.001
    """Weight of the KL to the reference, at the start; 0 runs without a reference."""
    kl_estimator: Estimator = "k2"
    """Estimator of that KL."""

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        return group_centred(rewards, groups, valid)

    def advantages(self, batch: Batch, penalty: Tensor, values: Tensor | None) -> Advantages:
        mask = batch.action_mask
        centred = super().advantages(batch, penalty, values).advantages
        flat = flat_groups(batch.rewards - penalty.sum(1), batch.groups, mask.any(1))
        return Advantages(advantages=whiten(centred, mask).where(~flat[:, None], 0.0))


CONFIG = ReinforcePPBaseline
