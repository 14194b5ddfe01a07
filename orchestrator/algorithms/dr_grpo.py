"""Dr. GRPO (arXiv:2503.20783): GRPO without its two biases.

No division by the group's deviation, which favours prompts that are nearly solved or nearly hopeless, and a
constant length (max_new_tokens) in place of each response's own, which favours long wrong responses. The
second is ``aggregate: constant_length``, this algorithm's default; OpenRLHF's dr_grpo has only the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from orchestrator.algorithms._groups import ClippedGroupAlgorithm
from orchestrator.estimators import group_centred
from orchestrator.settings import Aggregate

if TYPE_CHECKING:
    from torch import Tensor


class DrGRPO(ClippedGroupAlgorithm):
    """Clipped policy loss over rewards minus their group's mean."""

    name: ClassVar[str] = "dr_grpo"
    aggregate: ClassVar[Aggregate] = "constant_length"

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        return group_centred(rewards, groups, valid)


CONFIG = DrGRPO
