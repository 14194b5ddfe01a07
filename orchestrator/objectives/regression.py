"""A reward model from absolute ratings: the score is to be the rating (HelpSteer2, arXiv:2406.08673 sec. 3).

    loss = (score - rating)^2, averaged over the rows

The level of a score then has a meaning, the scale of the ratings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.batch import Examples, Loss
from orchestrator.objectives._base import Layout, Objective

if TYPE_CHECKING:
    from torch import Tensor


class Regression(Objective):
    """Responses with a number each."""

    name: ClassVar[str] = "regression"
    stage: ClassVar[Literal["sft", "reward_model", "preference"]] = "reward_model"
    layout: ClassVar[Layout] = "ratings"

    def loss(self, output: Tensor, part: Examples) -> Loss:
        """[b] scores -> [b] squared error of each row."""
        if part.targets is None:
            raise ValueError("regression needs ratings; name their column in rating_key")
        error = output - part.targets
        return Loss(values=error.square(), metrics={"absolute_error": error.detach().abs()})

    def weights(self, part: Examples) -> Tensor:
        """[b] 1 / rows of the minibatch."""
        return part.tokens.new_ones(len(part.tokens)).float() / max(1, len(part.tokens))


CONFIG = Regression
