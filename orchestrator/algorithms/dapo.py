"""DAPO (arXiv:2503.14476): GRPO without a KL, with clip-higher and every token weighing the same.

Its other two parts are the run's: dynamic sampling is ``rl.filter: {}``, the soft overlong punishment is
``rl.shaping.overlong_buffer``. The preset ``dapo`` sets both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveFloat

from orchestrator.algorithms._groups import ClippedGroupAlgorithm
from orchestrator.estimators import group_normalised
from orchestrator.settings import Aggregate

if TYPE_CHECKING:
    from torch import Tensor


class DAPO(ClippedGroupAlgorithm):
    """Clip-higher over advantages normalised within each prompt's group, token mean."""

    name: ClassVar[str] = "dapo"
    aggregate: ClassVar[Aggregate] = "token_mean"

    clip_high: PositiveFloat = 0.28
    """The ratio counts up to 1 + clip_high."""
    std_eps: PositiveFloat = 1e-6
    """Added to the standard deviation."""

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        return group_normalised(rewards, groups, valid, eps=self.std_eps)


CONFIG = DAPO
