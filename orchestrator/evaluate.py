"""Held-out answers and their figures: accuracy, pass@k, win rate."""

import asyncio
import math
from collections.abc import Callable, Sequence

from orchestrator.batch import Prompt, Rollout, ScoredRollout
from orchestrator.heldout import wilson
from orchestrator.roles import Engine, Reward, Sampling

Judge = Callable[[str, str, str | None], float]  # (response, prompt, label) -> score


async def evaluate(engine: Engine, prompts: Sequence[Prompt], judge: Judge, *, max_new_tokens: int) -> float:
    """The mean score over the prompts, one greedy response each; never judged by the reward model."""
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=max_new_tokens)

    async def one(prompt: Prompt) -> Rollout:
        return (await engine.generate(prompt, 1, sampling))[0]

    rollouts = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return sum(judge(r.text, r.prompt.text, r.prompt.label) for r in rollouts) / len(rollouts)


async def answers(
    engine: Engine, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling
) -> list[list[Rollout]]:
    """``num_samples`` answers to each prompt, in the order of the prompts."""
    return list(await asyncio.gather(*(engine.generate(prompt, num_samples, sampling) for prompt in prompts)))


async def judged(reward: Reward, groups: Sequence[Sequence[Rollout]]) -> list[list[ScoredRollout]]:
    """Raises ValueError for a reward that is not finite: a mean over the others would be of other prompts."""
    scored = list(await asyncio.gather(*(reward.score(group) for group in groups)))
    for one in (one for group in scored for one in group):
        if not math.isfinite(one.reward):
            raise ValueError(f"the reward of sample {one.rollout.uid} is {one.reward}: {one.parts}")
    return scored


def pass_at_k(num_samples: int, num_solved: int, k: int) -> float:
    """Unbiased estimate that one of k answers is right (arXiv:2107.03374 eq. 1): 1 - C(n - c, k) / C(n, k).

    Example: 1 right of 4, k = 2: 1 - 3 / 6 = 0.5.
    """
    return 1.0 - math.comb(num_samples - num_solved, k) / math.comb(num_samples, k)


def reward_figures(
    groups: Sequence[Sequence[float]], *, pass_at: Sequence[int], solved_from: float
) -> dict[str, float]:
    """Of the rewards of each prompt's answers: mean, its standard error over prompts, pass@k."""
    means = [sum(group) / len(group) for group in groups]
    mean = sum(means) / len(means)
    spread = sum((each - mean) ** 2 for each in means) / max(1, len(means) - 1)
    figures = {"reward": mean, "reward_error": math.sqrt(spread / len(means))}
    for k in pass_at:
        solved = [pass_at_k(len(g), sum(reward >= solved_from for reward in g), k) for g in groups]
        figures[f"pass_at_{k}"] = sum(solved) / len(solved)
    return figures


def win_figures(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """How often our answer to a prompt earns more than theirs, a tie counting half: all pairs of answers.

    The interval counts prompts and not pairs, which are not independent.
    """
    wins = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        beats = [(a > b) + (a == b) / 2 for a in mine for b in other]
        wins += sum(beats) / len(beats)
    low, high = wilson(wins, len(ours))
    return {"win_rate": wins / len(ours), "win_rate_low": low, "win_rate_high": high}
