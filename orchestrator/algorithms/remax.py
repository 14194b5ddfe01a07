"""ReMax (arXiv:2310.10505 eq. 8): the reward of the greedy response to the same prompt is the baseline.

One more response per prompt and no critic. The KL is in the reward of every token, so a token's advantage
holds that of the tokens after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from orchestrator.algorithms._base import Advantages, AlgorithmConfig
from orchestrator.batch import Batch, Experience, Loss
from orchestrator.estimators import returns_to_go, token_rewards
from orchestrator.kl import Estimator
from orchestrator.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class ReMax(AlgorithmConfig):
    """Clipped policy loss over returns minus the greedy response's reward."""

    name: ClassVar[str] = "remax"
    token_wise: ClassVar[bool] = True
    greedy_baseline: ClassVar[bool] = True

    clip_low: PositiveFloat = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio counts up to 1 + clip_high."""
    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL to the reference, at the start; 0 runs without a reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether that KL is taken from the reward or added to the loss."""
    kl_estimator: Estimator = "k1"
    """Estimator of that KL; k1 is unbiased in the reward."""

    def advantages(self, batch: Batch, penalty: Tensor, values: Tensor | None) -> Advantages:
        if batch.baselines is None:
            raise ValueError("remax compares with a greedy response, and the rollouts came without one")
        mask = batch.action_mask
        rewards = token_rewards(batch.rewards - batch.baselines, penalty, mask)
        return Advantages(advantages=returns_to_go(rewards, mask, gamma=1.0))

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        return clipped_surrogate(logprobs, old, part, low=self.clip_low, high=self.clip_high)


CONFIG = ReMax
