"""A reward model from preference pairs: the chosen response is to score higher than the rejected one.

    loss = -log sigmoid(score(chosen) - score(rejected) - margin), averaged over the pairs

The Bradley-Terry likelihood of the preferences (InstructGPT, arXiv:2203.02155 eq. 1). It fixes only
differences: a constant added to every score changes nothing, so the level of a score has no meaning. The
margin, 0 unless the data have one, says how much better the chosen response is (Llama 2, arXiv:2307.09288
eq. 2). With label smoothing the label is taken to be wrong with that probability.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.batch import Examples, Loss
from orchestrator.objectives._base import (
    Layout,
    Objective,
    half_right,
    halves,
    on_first_rows,
    pair_weights,
    smoothed,
)

if TYPE_CHECKING:
    from torch import Tensor


class BradleyTerry(Objective):
    """Pairs of responses, one better than the other."""

    name: ClassVar[str] = "bradley_terry"
    stage: ClassVar[Literal["sft", "reward_model", "preference"]] = "reward_model"
    layout: ClassVar[Layout] = "pairs"

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong."""

    def loss(self, output: Tensor, part: Examples) -> Loss:
        """[b] scores -> [b] loss of each pair at its even row, 0 at odd rows; ValueError for a cut pair."""
        chosen, rejected = halves(output)
        margin = chosen - rejected
        wanted = 0.0 if part.targets is None else halves(part.targets)[0]
        values = smoothed(margin - wanted, self.label_smoothing)
        margin = margin.detach()
        return Loss(
            values=on_first_rows(values),
            metrics={"accuracy": on_first_rows(half_right(margin)), "margin": on_first_rows(margin)},
        )

    def weights(self, part: Examples) -> Tensor:
        """[b] 1 / (pairs of the minibatch) on even rows, 0 on odd rows."""
        return pair_weights(part)


CONFIG = BradleyTerry
