"""A number that is not finite costs its step, not the run: nothing is learned from it, it is counted, and too
many end the run.

    rewards, log-probs, values    looked at in the loop, before anything is computed from them
    loss, gradients               looked at by the learners, on every rank (``skipped_steps``)
    weights                       looked at before every save and every sync: those are refused
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor

SKIPPED = "skipped_steps"  # share of the step's updates that were skipped; a learner's: "actor/skipped_steps"
NON_FINITE = "non_finite/"  # + column: how many of its numbers
IN_A_ROW, SHARE = 3, 0.01  # at most so many steps in a row, and (of more than IN_A_ROW) of all steps


class NonFiniteError(RuntimeError):
    """More steps were skipped than a sound run has."""


def non_finite(batch: Batch, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """{"non_finite/rewards": how many} of each column with a number, on the action mask, that is not finite.

    Rewards are looked at row for row, those of empty responses too; ``scores`` are [B, T] or [B, T, V].
    """
    columns = {"rewards": ~batch.rewards.isfinite()}
    if batch.baselines is not None:
        columns["baselines"] = ~batch.baselines.isfinite()
    for name, score in {"rollout_logprobs": batch.rollout_logprobs, **scores}.items():
        if not score.sum().isfinite():  # a finite sum has finite terms only
            columns[name] = ~score[batch.action_mask].isfinite()
    return {f"{NON_FINITE}{name}": float(bad.sum()) for name, bad in columns.items() if bad.any()}


def was_skipped(metrics: Mapping[str, float]) -> bool:
    """Whether any learner took less than all of its updates in the step."""
    return any(value > 0 for name, value in metrics.items() if name.split("/")[-1] == SKIPPED)


class Patience:
    """Counts skipped steps; one for each stage."""

    def __init__(self, num_steps: int) -> None:
        self._allowed = max(IN_A_ROW, int(SHARE * num_steps))
        self.in_a_row, self.total = 0, 0

    def seen(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether this step was skipped. Raises NonFiniteError when that is too often."""
        if not was_skipped(metrics):
            self.in_a_row = 0
            return False
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        if self.in_a_row > IN_A_ROW or self.total > self._allowed:
            raise NonFiniteError(
                f"step {step} is the {self.in_a_row}. in a row and the {self.total}. in all that was skipped "
                f"because of numbers that are not finite; at most {IN_A_ROW} in a row and {self._allowed} in "
                "all are allowed. The batches are in the folder non_finite/; look at rewards and log-probs "
                "there, or lower the learning rate"
            )
        return True
