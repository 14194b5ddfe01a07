"""What the algorithms share whose baseline is the other samples of the same prompt."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveFloat

from orchestrator.algorithms._base import Advantages, AlgorithmConfig
from orchestrator.batch import Batch, Experience, Loss
from orchestrator.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class GroupAlgorithm(AlgorithmConfig):
    """One number per response, the same for all of its tokens.

    A KL in the reward is the response's sum of it, subtracted before samples are compared (RLOO,
    arXiv:2402.14740 section 3.1; OpenRLHF leaves it out of the comparison).
    """

    compares_siblings: ClassVar[bool] = True

    @abstractmethod
    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        """[B] rewards -> [B] advantages; 0 where ``valid`` is False: a response without tokens."""

    def advantages(self, batch: Batch, penalty: Tensor, values: Tensor | None) -> Advantages:
        mask = batch.action_mask
        compared = self.compare(batch.rewards - penalty.sum(1), batch.groups, mask.any(1))
        return Advantages(advantages=compared[:, None] * mask)


class ClippedGroupAlgorithm(GroupAlgorithm):
    """With PPO's clip around the policy before the step."""

    token_wise: ClassVar[bool] = True

    clip_low: PositiveFloat = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio counts up to 1 + clip_high."""

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        return clipped_surrogate(logprobs, old, part, low=self.clip_low, high=self.clip_high)
