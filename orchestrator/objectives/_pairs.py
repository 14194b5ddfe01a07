"""The ground of every objective on pairs of responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.batch import Examples
from orchestrator.objectives._base import Layout, Objective, pair_weights

if TYPE_CHECKING:
    from torch import Tensor


class PairObjective(Objective):
    """Trains the policy on (chosen, rejected); every pair weighs the same."""

    stage: ClassVar[Literal["sft", "reward_model", "preference"]] = "preference"
    layout: ClassVar[Layout] = "pairs"

    def weights(self, part: Examples) -> Tensor:
        """[b] 1 / (pairs of the minibatch) on even rows, 0 on odd rows."""
        return pair_weights(part)
