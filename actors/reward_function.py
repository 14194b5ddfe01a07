"""Where reward functions are found."""

from collections.abc import Callable

from orchestrator import plugins

RewardFunction = Callable[[str, str, str | None], float]  # (response, prompt, label) -> reward


def find_reward_function(spec: str) -> RewardFunction:
    """A file in actors/rewards/, or package.module:name; ValueError lists the known ones."""
    if ":" in spec:
        return plugins.load(spec)
    return plugins.find("actors.rewards", spec).score
