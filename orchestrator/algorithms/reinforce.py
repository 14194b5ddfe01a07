"""REINFORCE (Williams 1992): the return from each action on, and the plain policy gradient.

No critic, no clip, no siblings: the degenerate case that the others are measured against. With
``baseline: batch`` the mean return of the batch is subtracted, which changes no expectation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.algorithms._base import Advantages, AlgorithmConfig
from orchestrator.batch import Batch, Experience, Loss
from orchestrator.estimators import masked_mean, returns_to_go, token_rewards
from orchestrator.kl import Estimator
from orchestrator.settings import Fraction
from orchestrator.surrogate import unclipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class Reinforce(AlgorithmConfig):
    """Policy gradient with returns."""

    name: ClassVar[str] = "reinforce"
    token_wise: ClassVar[bool] = True

    gamma: Fraction = 1.0
    """Discount per action token."""
    baseline: Literal["none", "batch"] = "batch"
    """What is subtracted from the returns."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL is taken from the reward or added to the loss."""
    kl_estimator: Estimator = "k1"
    """Estimator of that KL; k1 is unbiased in the reward."""

    def advantages(self, batch: Batch, penalty: Tensor, values: Tensor | None) -> Advantages:
        mask = batch.action_mask
        returns = returns_to_go(token_rewards(batch.rewards, penalty, mask), mask, gamma=self.gamma)
        if self.baseline == "batch":
            returns = (returns - masked_mean(returns, mask)).where(mask, 0.0)
        return Advantages(advantages=returns)

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        return unclipped_surrogate(logprobs, old, part)


CONFIG = Reinforce
