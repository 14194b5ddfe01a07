"""REINFORCE++ (arXiv:2501.03262): returns with the KL in them, whitened over the whole batch, and PPO's clip.

No critic and no siblings: the batch is the baseline. The return of a token includes the KL of later tokens;
tokens between turns are skipped (verl carries the return across them, SkyRL resets it there).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from orchestrator.algorithms._base import Advantages, AlgorithmConfig
from orchestrator.batch import Batch, Experience, Loss
from orchestrator.estimators import returns_to_go, token_rewards, whiten
from orchestrator.kl import Estimator
from orchestrator.settings import Fraction
from orchestrator.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class ReinforcePP(AlgorithmConfig):
    """Clipped policy loss over whitened returns."""

    name: ClassVar[str] = "reinforce_pp"
    token_wise: ClassVar[bool] = True

    gamma: Fraction = 1.0
    """Discount per action token."""
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
        mask = batch.action_mask
        returns = returns_to_go(token_rewards(batch.rewards, penalty, mask), mask, gamma=self.gamma)
        return Advantages(advantages=whiten(returns, mask))

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        return clipped_surrogate(logprobs, old, part, low=self.clip_low, high=self.clip_high)


CONFIG = ReinforcePP
