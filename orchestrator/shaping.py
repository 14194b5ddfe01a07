"""What happens to a response's reward before an algorithm sees it.

The order, written down once:

    1  the run's rewards, each by its weight, are added up             (at ingest, ``roles.reward``)
    2  clip                  to +-clip
    3  normalise             by mean and deviation of all rewards so far, this batch included
    4  overlong penalty      for the last tokens before max_new_tokens
    5  truncation scale      for responses that were cut
    6  missing-EOS penalty   for responses that were cut
    7  baseline or critic, and the KL to the reference, by the algorithm

So clipping bounds what the statistics see, and penalties are in units of the normalised reward and never
enter the statistics. OpenRLHF clips after the baseline, where the bound no longer speaks of rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from orchestrator.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningStats:
    """Count, mean and sum of squared deviations of all rewards so far."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def updated(self, values: Tensor) -> RunningStats:
        """With these [n] values seen too (Chan, Golub, LeVeque 1979, eq. 2.1), in float64."""
        new = values.double()
        if not len(new):
            return self
        count, mean = self.count + len(new), float(new.mean())
        delta, m2 = mean - self.mean, float((new - mean).square().sum())
        return RunningStats(
            count=count,
            mean=self.mean + delta * len(new) / count,
            m2=self.m2 + m2 + delta * delta * self.count * len(new) / count,
        )

    @property
    def std(self) -> float:
        """Unbiased; 1 while there is nothing to divide by."""
        return sqrt(self.m2 / (self.count - 1)) if self.count > 1 and self.m2 > 0 else 1.0


class Shaping(Settings):
    """Steps 2 to 6 of the order above; all off by default."""

    clip: PositiveFloat | None = None
    """Rewards are clipped to +- this; null: no clipping."""
    normalize: Literal["none", "scale", "standard"] = "none"
    """scale: divide by the deviation of all rewards so far; standard: subtract their mean first."""
    overlong_buffer: PositiveInt | None = None
    """Soft overlong punishment (DAPO, arXiv:2503.14476 eq. 13): in the last this many tokens before
    max_new_tokens a response loses up to overlong_penalty; null: nothing."""
    overlong_penalty: NonNegativeFloat = 1.0
    """What a response of max_new_tokens loses."""
    truncation_scale: Annotated[float, Field(ge=0, le=1)] | None = None
    """The reward of a response that was cut is multiplied by this (OpenRLHF's
    stop_properly_penalty_coef); null: is not."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """What a response that was cut loses."""


def shape(
    batch: Batch, settings: Shaping, stats: RunningStats, *, max_new_tokens: int
) -> tuple[Tensor, RunningStats, dict[str, float]]:
    """[B] shaped rewards, the statistics after this batch, and what was done, for the log.

    Responses without tokens enter no statistic. Example: rewards [4, 1], clip 2 -> [2, 1]; the second was
    cut, truncation_scale 0.5, missing_eos_penalty 0.25 -> [2, 0.25].
    """
    lengths = batch.action_mask.sum(1)
    rewards, figures = batch.rewards, {}
    if settings.clip is not None:
        clipped = rewards.clamp(-settings.clip, settings.clip)
        figures["rewards_clipped"] = float((clipped != rewards).float().mean())
        rewards = clipped
    if settings.normalize != "none":
        stats = stats.updated(rewards[lengths > 0])
        rewards = (rewards - (stats.mean if settings.normalize == "standard" else 0.0)) / stats.std
        figures |= {"reward_running_mean": stats.mean, "reward_running_std": stats.std}
    if settings.overlong_buffer is not None:
        over = (lengths - (max_new_tokens - settings.overlong_buffer)).clamp(0, settings.overlong_buffer)
        penalty = over.to(rewards.dtype) / settings.overlong_buffer * settings.overlong_penalty
        rewards = rewards - penalty
        figures["overlong_penalty"] = float(penalty.mean())
    cut = ~batch.stopped
    if settings.truncation_scale is not None:
        rewards = (rewards * settings.truncation_scale).where(cut, rewards)
    rewards = rewards - settings.missing_eos_penalty * cut
    return rewards, stats, figures
