"""A reward model from rankings: K responses of a prompt in one forward pass, all their comparisons at once.

    loss of a prompt = -1 / (comparisons) sum over i better than j of log sigmoid(score i - score j)

InstructGPT's eq. 1 (arXiv:2203.02155): the C(K, 2) comparisons of a prompt are correlated, so they are one
example and every prompt weighs the same. ``targets`` order the rows of a group: higher is better, equal ones
are not compared. K = 2 is Bradley-Terry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.batch import Examples, Loss
from orchestrator.objectives._base import Layout, Objective, half_right, softplus

if TYPE_CHECKING:
    from torch import Tensor


class Ranking(Objective):
    """K ranked responses of a prompt."""

    name: ClassVar[str] = "ranking"
    stage: ClassVar[Literal["sft", "reward_model", "preference"]] = "reward_model"
    layout: ClassVar[Layout] = "rankings"

    def loss(self, output: Tensor, part: Examples) -> Loss:
        """[b] scores -> [b] loss of each prompt at its first row, 0 at the others."""
        if part.groups is None or part.targets is None:
            raise ValueError("ranking needs groups and ranks; give the stage rows with responses_key")
        first, group = _first_rows(part.groups), _group_index(part.groups)
        better = (group[:, None] == group) & (part.targets[:, None] > part.targets)  # [b, b]
        share = better.to(output.dtype)
        count = share.new_zeros(len(group)).index_add(0, group, share.sum(1))  # comparisons of each group
        share = share / count.clamp(min=1)[group, None]
        margin = output[:, None] - output  # [b, b] of the row over the column

        def per_group(figure: Tensor) -> Tensor:
            """Mean over the comparisons of each group, on its first row."""
            sums = figure.new_zeros(len(group)).index_add(0, group, (share * figure).sum(1))
            return sums[group].where(first, 0.0)

        seen = margin.detach()
        return Loss(
            values=per_group(softplus(-margin)),
            metrics={"accuracy": per_group(half_right(seen)), "margin": per_group(seen)},
        )

    def weights(self, part: Examples) -> Tensor:
        """[b] 1 / (prompts of the minibatch) on the first row of each."""
        if part.groups is None:
            raise ValueError("ranking needs groups; give the stage rows with responses_key")
        first = _first_rows(part.groups).float()
        return first / first.sum().clamp(min=1)


def _first_rows(groups: Tensor) -> Tensor:
    """[b] ascending -> [b] bool, True where a group begins: [4, 4, 7] gives T F T."""
    starts = groups.new_ones(len(groups)).bool()
    starts[1:] = groups[1:] != groups[:-1]
    return starts


def _group_index(groups: Tensor) -> Tensor:
    """[b] ascending -> 0, 1, ...: [4, 4, 7] gives [0, 0, 1]."""
    return _first_rows(groups).long().cumsum(0) - 1


CONFIG = Ranking
