"""Best-of-n, rejection sampling fine-tuning: the policy imitates the best of its own samples of each prompt.

    loss = -mean over prompts of the mean log p of the tokens of the response with the highest reward

RAFT (arXiv:2304.06767 algorithm 1), Llama 2's rejection sampling (arXiv:2307.09288 section 3.2.3): supervised
fine-tuning inside the loop. Equals share their place (the papers take one of
them), and a group without any difference has no best and teaches nothing. In the loop's terms a response is
worth n when it is the best of n, n / 2 when it is one of two, and else 0: every sequence weighs
1 / (prompts x n), so the n cancels. No ratio and no clip: later updates imitate as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from orchestrator.algorithms._groups import GroupAlgorithm
from orchestrator.batch import Experience, Loss
from orchestrator.estimators import flat_groups, group_best, group_sums
from orchestrator.settings import Aggregate

if TYPE_CHECKING:
    from torch import Tensor


class BestOfN(GroupAlgorithm):
    """Negative log-likelihood of the best sample of each prompt."""

    name: ClassVar[str] = "best_of_n"
    token_wise: ClassVar[bool] = True
    aggregate: ClassVar[Aggregate] = "sequence_mean"

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        best = group_best(rewards, groups, valid) & ~flat_groups(rewards, groups, valid)
        size, equals = (group_sums(rows.to(rewards.dtype), groups) for rows in (valid, best))
        return (size / equals.clamp(min=1)).where(best, 0.0)

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        mask = part.action_mask
        return Loss(values=-logprobs.where(mask, 0.0) * part.advantages.where(mask, 0.0), metrics={})


CONFIG = BestOfN
