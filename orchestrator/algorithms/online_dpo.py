"""Online (iterative) DPO: the policy's own samples, ranked by the reward, are the preference pairs.

    chosen, rejected = the samples of a prompt with the highest and the lowest reward
    loss = -log sigmoid(beta (log p/p_ref (chosen) - log p/p_ref (rejected))), averaged over the pairs

arXiv:2402.04792 algorithm 1 with a reward as annotator, arXiv:2405.07863 algorithm 1 (best against worst of
several). Of equals the likeliest under the engine is taken; a prompt whose samples all earn the same has no
pair. Samples between best and worst are not trained on. The advantage says which side a token is on: 1
chosen, -1 rejected. Both rows of a pair carry the pair's loss, so that the mean over sequences is the mean
over pairs; they must meet in one micro-batch (``Experience.groups``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, PositiveFloat

from orchestrator.algorithms._base import Advantages, AlgorithmConfig
from orchestrator.batch import Batch, Examples, Experience, Loss, PolicyOutput
from orchestrator.estimators import flat_groups, group_best, group_first, group_sums
from orchestrator.objectives.dpo import DPO
from orchestrator.settings import Aggregate

if TYPE_CHECKING:
    from torch import Tensor


class OnlineDPO(AlgorithmConfig):
    """DPO on the best and the worst of each prompt's samples."""

    name: ClassVar[str] = "online_dpo"
    compares_siblings: ClassVar[bool] = True
    steps_on_groups: ClassVar[bool] = True
    aggregate: ClassVar[Aggregate] = "sequence_mean"

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference: margins are beta times the difference of log-ratios."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that the reward ranks a pair wrongly (cDPO)."""

    def roles(self) -> frozenset[str]:
        return super().roles() | {"reference"}

    def wants_scores(self, num_updates: int) -> bool:
        """The loss has no ratio to the policy before the step."""
        return super().wants_scores(1)

    def advantages(self, batch: Batch, penalty: Tensor, values: Tensor | None) -> Advantages:
        mask, groups = batch.action_mask, batch.groups
        rewards, valid = batch.rewards - penalty.sum(1), mask.any(1)
        likelihood = batch.rollout_logprobs.where(mask, 0.0).sum(1)
        signal = valid & ~flat_groups(rewards, groups, valid)
        side = likelihood.new_zeros(len(mask))
        for sign in (1, -1):
            equals = signal & group_best(sign * rewards, groups, valid)
            side += sign * group_first(group_best(likelihood, groups, equals), groups).to(side.dtype)
        return Advantages(advantages=side[:, None] * mask)

    def experience(
        self, batch: Batch, scores: dict[str, Tensor], kl_coef: float
    ) -> tuple[Experience, dict[str, float]]:
        """Only rows of pairs keep their actions. Of a prompt without a pair the first row stays, as an empty
        one, so that every step has as many groups as prompts."""
        found, metrics = super().experience(batch, scores, kl_coef)
        paired = (found.advantages != 0).any(1)
        without = group_sums(paired.float(), batch.groups) == 0
        kept = paired | group_first(without, batch.groups)
        mask = found.action_mask & paired[:, None]
        return replace(found, action_mask=mask, groups=batch.groups.where(kept, -1)), metrics

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        """ValueError where a pair was cut."""
        mask, side = part.action_mask, part.advantages.where(part.action_mask, 0.0).sum(1).sign()
        assert part.groups is not None and part.ref_logprobs is not None
        chosen, rejected = (_rows_of(side == sign, part.groups) for sign in (1, -1))
        if part.groups[chosen].tolist() != part.groups[rejected].tolist():
            raise ValueError(
                f"{len(chosen)} chosen and {len(rejected)} rejected rows are not whole pairs; cut "
                "micro-batches between groups"
            )
        rows = chosen.new_zeros(2 * len(chosen))
        rows[0::2], rows[1::2] = chosen, rejected
        reference = part.ref_logprobs.where(mask, 0.0).sum(1)
        examples = Examples(
            tokens=part.tokens[rows],
            attention_mask=part.attention_mask[rows],
            action_mask=mask[rows],
            ref_logprobs=reference[rows],
        )
        objective = DPO(beta=self.beta, label_smoothing=self.label_smoothing)
        loss = objective.loss(PolicyOutput(logprobs=logprobs[rows], entropy=None), examples)

        def on_tokens(pairs: Tensor) -> Tensor:
            """[2n], the pair's figure on its first row -> [B, T], the same on all actions of both rows."""
            both = pairs.view(len(chosen), 2).sum(1).repeat_interleave(2)
            return logprobs.new_zeros(len(mask)).index_add(0, rows, both)[:, None] * mask

        metrics = {name: on_tokens(figure) for name, figure in loss.metrics.items()}
        return Loss(values=on_tokens(loss.values), metrics=metrics)


def _rows_of(chosen: Tensor, groups: Tensor) -> Tensor:
    """The rows asked for, in the order of their groups."""
    rows = chosen.nonzero().squeeze(1)
    return rows[groups[rows].argsort()]


CONFIG = OnlineDPO
