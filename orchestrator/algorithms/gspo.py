"""Group sequence policy optimisation (arXiv:2507.18071): the ratio is the response's, not the token's.

s = exp(mean over the tokens of log ratio) (eq. 7), clipped far more tightly than a token's. Each token
carries s, and the sequence mean makes it one term per response (eq. 5). verl and SkyRL take the token form
(eq. 13), whose gradient is the same where advantages are equal within a response: ``token_form: true``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveFloat

from orchestrator.algorithms._groups import GroupAlgorithm
from orchestrator.batch import Experience, Loss
from orchestrator.estimators import group_normalised
from orchestrator.settings import Aggregate
from orchestrator.surrogate import clip_ratio, log_ratios, sequence_mean

if TYPE_CHECKING:
    from torch import Tensor


class GSPO(GroupAlgorithm):
    """Clipped sequence ratio over advantages normalised within each prompt's group."""

    name: ClassVar[str] = "gspo"
    aggregate: ClassVar[Aggregate] = "sequence_mean"

    clip_low: PositiveFloat = 3e-4
    """The sequence's ratio counts down to 1 - clip_low."""
    clip_high: PositiveFloat = 4e-4
    """The sequence's ratio counts up to 1 + clip_high."""
    token_form: bool = False
    """GSPO-token: each token's own gradient, scaled by the sequence's ratio."""
    std_eps: PositiveFloat = 1e-6
    """Added to the standard deviation."""

    def compare(self, rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        return group_normalised(rewards, groups, valid, eps=self.std_eps)

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        moved = log_ratios(logprobs, old, part)
        ratio = sequence_mean(moved, part).exp().expand_as(moved)
        if self.token_form:
            ratio = ratio.detach() * (moved - moved.detach()).exp()
        return clip_ratio(ratio, part, low=self.clip_low, high=self.clip_high)


CONFIG = GSPO
