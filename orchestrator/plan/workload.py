"""What flows through a run: how long prompts and responses are. The longest decide the memory, the means and
the tail the time; none of it is in a run's YAML, so what is assumed is said."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

from orchestrator.config import RL, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths in tokens. Example: prompts of 6, responses of 1 to 5 with mean 4."""

    prompt: int  # mean
    longest_prompt: int
    response: float  # mean, of responses already cut at ``limit``
    limit: int  # rl.sampling.max_new_tokens
    spread: float = 0.8  # sigma of the log of the lengths: a long tail
    assumed: tuple[str, ...] = ()  # what nobody measured

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.limit

    @property
    def mean(self) -> float:
        return self.prompt + self.response

    def draw(self, chance: random.Random) -> int:
        """The length of one response: lognormal, cut at the limit, at least 1."""
        drawn = math.exp(
            _location(self.response, self.limit, self.spread) + self.spread * chance.gauss(0.0, 1.0)
        )
        return max(1, min(self.limit, round(drawn)))


@cache
def _location(mean: float, limit: int, spread: float) -> float:
    """The log of the median with which lengths cut at ``limit`` have this mean."""
    low, high = -2.0, math.log(limit) + 6 * spread + 1
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _cut_mean(middle, limit, spread) < mean else (low, middle)
    return (low + high) / 2


def _cut_mean(m: float, c: int, s: float) -> float:
    """E[min(X, c)] of a lognormal X: exp(m + s^2/2) N((ln c - m - s^2)/s) + c N((m - ln c)/s)."""
    inside = math.exp(m + s * s / 2) * _normal((math.log(c) - m - s * s) / s)
    return inside + c * _normal((m - math.log(c)) / s)


def _normal(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def workload(run: Run, rl: RL, *, prompt: int | None, response: float | None) -> Workload:
    """Of a run; a length that is None is assumed: prompts a quarter of the room that responses leave,
    responses half of the limit. ValueError for lengths that the run does not allow."""
    room, limit = run.model.max_length - rl.sampling.max_new_tokens, rl.sampling.max_new_tokens
    if prompt is not None and not 1 <= prompt <= room:
        raise ValueError(
            f"--prompt-tokens={prompt} is not within 1 and model.max_length - rl.sampling.max_new_tokens = "
            f"{room}; "
            "give the mean length of your prompts"
        )
    if response is not None and not 1 <= response <= limit:
        raise ValueError(
            f"--response-tokens={response:g} is not within 1 and rl.sampling.max_new_tokens={limit}; give "
            "the mean "
            "length of your responses"
        )
    assumed = []
    if prompt is None:
        prompt = max(1, room // 4)
        assumed.append(f"prompts of {prompt} tokens on average (--prompt-tokens)")
    if response is None:
        response = max(1.0, limit / 2)
        assumed.append(f"responses of {response:g} tokens on average (--response-tokens)")
    return Workload(
        prompt=prompt, longest_prompt=room, response=response, limit=limit, assumed=tuple(assumed)
    )
