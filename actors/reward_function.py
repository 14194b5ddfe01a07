"""The reward role when a function judges: no model, the same verbs."""

import math
from collections.abc import Callable

from actors.worker import Worker
from orchestrator import plugins
from orchestrator.batch import Rollout

RewardFunction = Callable[[str, str, str | None], float]  # (response, prompt, label) -> reward


def find_reward_function(spec: str) -> RewardFunction:
    """A file in actors/rewards/, or package.module:name; ValueError lists the known ones."""
    if ":" in spec:
        return plugins.load(spec)
    return plugins.find("actors.rewards", spec).score


class FunctionReward(Worker):
    """Calls the function once per response; its ranks never talk to each other."""

    role = "reward"
    collective = False

    def __init__(self, *, function: str) -> None:
        self.function = function

    def start(self) -> None:
        self._score = find_reward_function(self.function)

    def score_rollouts(self, rollouts: list[Rollout]) -> list[float]:
        """Raises ValueError naming the sample when a reward is not a finite number (BUGS B16)."""
        rewards = [self._score(r.text, r.prompt.text, r.prompt.label) for r in rollouts]
        for rollout, reward in zip(rollouts, rewards, strict=True):
            if not math.isfinite(reward):
                raise ValueError(
                    f"{self.function} gave sample {rollout.uid} the reward {reward}; expected a finite number"
                )
        return rewards
