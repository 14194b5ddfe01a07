"""SHIM."""

from collections.abc import Sequence

from pydantic import PositiveInt

from orchestrator.settings import Settings


class GroupFilter(Settings):
    max_draws: PositiveInt = 10
    """How often."""

    def keeps(self, rewards: Sequence[float]) -> bool:
        return max(rewards) > min(rewards)
