"""Where reward functions are found."""

from collections.abc import Callable, Sequence

from actors.remote_reward import RemoteReward
from orchestrator import plugins
from orchestrator.batch import Rollout

RewardFunction = Callable[[str, str, str | None], float]  # (response, prompt, label) -> reward


def find_reward_function(spec: str) -> RewardFunction:
    """A file in actors/rewards/, package.module:name, or URLs with commas; else ValueError."""
    if spec.startswith(("http://", "https://")):
        return RemoteReward(spec.split(","))
    if ":" in spec:
        return plugins.load(spec)
    return plugins.find("actors.rewards", spec).score


def judge_all(function: RewardFunction, rollouts: Sequence[Rollout]) -> list[float]:
    """One reward per rollout; a service is asked for all at once."""
    questions = [(r.text, r.prompt.text, r.prompt.label) for r in rollouts]
    if isinstance(function, RemoteReward):
        return function.score_all(questions)
    return [function(*question) for question in questions]
