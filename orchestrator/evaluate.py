"""Held-out accuracy: greedy answers, judged by a function of the task and never by the reward model."""

import asyncio
from collections.abc import Callable, Sequence

from orchestrator.batch import Prompt, Rollout
from orchestrator.roles import Engine, Sampling

Judge = Callable[[str, str, str | None], float]  # (response, prompt, label) -> score


async def evaluate(engine: Engine, prompts: Sequence[Prompt], judge: Judge, *, max_new_tokens: int) -> float:
    """The mean score over the prompts, one greedy response each."""
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=max_new_tokens)

    async def one(prompt: Prompt) -> Rollout:
        return (await engine.generate(prompt, 1, sampling))[0]

    rollouts = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return sum(judge(r.text, r.prompt.text, r.prompt.label) for r in rollouts) / len(rollouts)
