"""The driver: prompts -> rollouts -> scores -> experience -> updates -> weights, once per step.

Reads no file, opens no device, runs no model, imports no Ray: every role is a handle that answers an
``await``. See ``roles.py`` for what each one promises. Generation of later prompts overlaps everything else
as far as ``rl.staleness`` allows (``stream.py``); within a step, all roles that can work at once do.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from orchestrator.batch import Batch, Experience, Prompt, ScoredRollout
from orchestrator.collate import collate
from orchestrator.config import RL
from orchestrator.ledger import Ledger
from orchestrator.metrics import logprob_mismatch, mean_metrics
from orchestrator.minibatch import minibatches
from orchestrator.publish import Probe, publish
from orchestrator.roles import Metrics, Roles, Sampling
from orchestrator.stream import RolloutStream


class StaleRolloutError(RuntimeError):
    """A rollout older than the run allows reached a batch."""


class Observer(Protocol):
    """What happens around the steps: logs, checkpoints, evaluations. The loop does not know."""

    async def started(self, step: int) -> None: ...
    async def stepped(
        self, step: int, groups: Sequence[Sequence[ScoredRollout]], batch: Batch, metrics: Metrics
    ) -> None: ...


async def train(  # noqa: PLR0913 - a run, by name
    rl: RL,
    roles: Roles,
    ledger: Ledger,
    *,
    observer: Observer,
    probe: Probe,
    start: int,
    seed: int,
    pad_id: int,
) -> None:
    """Runs the steps ``start + 1`` to ``rl.steps``; the learners hold the weights of step ``start``."""
    step = start
    proof = await publish(roles, step, probe)
    await observer.started(step)
    sampling = Sampling(**rl.sampling.model_dump())

    async def sample(prompt: Prompt) -> list[ScoredRollout]:
        rollouts = await roles.engine.generate(prompt, rl.samples_per_prompt, sampling)
        return await roles.reward.score(rollouts)

    slots = (rl.staleness + 1) * rl.prompts_per_step
    async with RolloutStream(ledger.prompts(), sample, slots=slots) as stream:
        while step < rl.steps:
            groups = await stream.take(rl.prompts_per_step)
            batch = collate([scored for group in groups for scored in group], pad_id=pad_id)
            check_fresh(batch, step, rl.staleness)
            synced = await proof

            scores = await score(roles, batch, rl)
            experience, shaped = rl.algorithm.experience(batch, scores, rl.algorithm.initial_kl_coef)
            if "actor" in scores:
                shaped |= logprob_mismatch(scores["actor"], batch)

            step += 1
            learned = await learn(roles, experience, rl, seed=seed + step)
            proof = await publish(roles, step, probe)

            ledger.settle([group[0].rollout.prompt for group in groups], step)
            await observer.stepped(step, groups, batch, {**learned, **shaped, **synced})
            stream.release(len(groups))
    await proof


async def score(roles: Roles, batch: Batch, rl: RL) -> dict[str, Tensor]:
    """One forward pass per role that the algorithm reads, all at once: {role: [B, T]}."""
    num_updates = rl.updates.epochs * rl.updates.minibatches
    scorers = {"critic": roles.critic, "reference": roles.reference}
    if rl.algorithm.wants_scores(num_updates):
        scorers["actor"] = roles.actor
    asked = {name: scorer for name, scorer in scorers.items() if scorer is not None}
    answers = await asyncio.gather(*(scorer.score(batch) for scorer in asked.values()))
    return dict(zip(asked, answers, strict=True))


async def learn(roles: Roles, experience: Experience, rl: RL, *, seed: int) -> Metrics:
    """Every learner steps on the same minibatch at once; one call is one optimizer step."""
    history: list[Metrics] = []
    for minibatch in minibatches(
        experience,
        rl.updates,
        aggregate=rl.updates.aggregate or rl.algorithm.aggregate,
        constant_length=rl.sampling.max_new_tokens,
        seed=seed,
    ):
        learners = dict(roles.learners())
        answers = await asyncio.gather(*(learner.update(minibatch) for learner in learners.values()))
        history.append(
            {
                f"{role}/{k}": v
                for role, answer in zip(learners, answers, strict=True)
                for k, v in answer.items()
            }
        )
    return mean_metrics(history)


def check_fresh(batch: Batch, step: int, staleness: int) -> None:
    oldest, newest = int(batch.versions.min()), int(batch.versions.max())
    if oldest < step - staleness or newest > step:
        raise StaleRolloutError(
            f"a batch for step {step + 1} holds rollouts of weight versions {oldest} to {newest}; "
            f"rl.staleness={staleness} allows {step - staleness} to {step}"
        )
