"""Which groups are worth training on (dynamic sampling, DAPO, arXiv:2503.14476 section 3.2)."""

from collections.abc import Sequence
from math import isfinite

from pydantic import PositiveInt, model_validator

from orchestrator.settings import Settings


class GroupFilter(Settings):
    """Looks at the rewards of one prompt's samples as they came, before shaping."""

    flat: bool = True
    """Drop groups whose rewards are all equal: compared with each other they teach nothing."""
    above: float | None = None
    """Keep only groups whose mean reward is above this (exact-match accuracy 0: too hard)."""
    below: float | None = None
    """Keep only groups whose mean reward is below this (exact-match accuracy 1: too easy)."""
    max_draws: PositiveInt = 10
    """How many times prompts_per_step prompts may be drawn for one step. After that the batch keeps the
    groups it has, so that refilling ends."""

    @model_validator(mode="after")
    def _ordered(self) -> "GroupFilter":
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"filter.above={self.above} must be below filter.below={self.below}")
        return self

    def keeps(self, rewards: Sequence[float]) -> bool:
        """Whether a group with these rewards, at least one, goes into the batch. One with a reward that is
        not finite does: the loop must see it."""
        if not all(map(isfinite, rewards)):
            return True
        mean = sum(rewards) / len(rewards)
        if self.flat and max(rewards) == min(rewards):
            return False
        if self.above is not None and mean <= self.above:
            return False
        return self.below is None or mean < self.below
