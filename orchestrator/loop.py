"""The driver: prompts -> rollouts -> scores -> experience -> updates -> weights, once per step.

Reads no file, opens no device, runs no model, imports no Ray: every role is a handle that answers an
``await``. See ``roles.py`` for what each one promises. Generation of later prompts overlaps everything else
as far as ``rl.staleness`` allows (``stream.py``); within a step, all roles that can work at once do.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from orchestrator.batch import Batch, Experience, Minibatch, Prompt, ScoredRollout
from orchestrator.collate import collate, collate_scores
from orchestrator.config import RL
from orchestrator.drawing import Group, draw, prompts_at_once, sample
from orchestrator.driver_state import DriverState
from orchestrator.ledger import Ledger
from orchestrator.metrics import KL_COEF, ROLLOUT_LOGPROB_DIFF_MEAN, mean_metrics, staleness_shares
from orchestrator.minibatch import minibatches
from orchestrator.mismatch import MISMATCH, mismatch_cause
from orchestrator.numbers import SKIPPED, non_finite, was_skipped
from orchestrator.publish import Probe, publish
from orchestrator.roles import Metrics, Roles
from orchestrator.scoring import score
from orchestrator.shaping import shape
from orchestrator.stream import RolloutStream

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class StaleRolloutError(RuntimeError):
    """A rollout older than the run allows reached a batch."""


class Observer(Protocol):
    """What happens around the steps: logs, checkpoints, evaluations. The loop does not know."""

    async def started(self, step: int) -> None: ...
    async def stepped(
        self, state: DriverState, groups: Sequence[Sequence[ScoredRollout]], batch: Batch, metrics: Metrics
    ) -> None: ...


async def train(  # noqa: PLR0913 - a run, by name
    rl: RL,
    roles: Roles,
    ledger: Ledger,
    *,
    observer: Observer,
    probe: Probe,
    start: DriverState,
    seed: int,
    pad_id: int,
) -> None:
    """Runs the steps ``start.step + 1`` to ``rl.steps``; the learners hold the weights of ``start``."""
    state = start
    proof = await publish(roles, state.step, probe)
    await observer.started(state.step)

    async def sampled(prompts: Sequence[Prompt]) -> list[Group]:
        return await ledger.once(prompts, lambda unfinished: sample(unfinished, rl, roles))

    at_once = prompts_at_once(rl)
    order = ledger.prompts()
    prompts: Iterator[Sequence[Prompt]] = ([next(order) for _ in range(at_once)] for _ in count())
    slots = (rl.staleness + 1) * rl.prompts_per_step // at_once
    async with RolloutStream(prompts, sampled, slots=slots) as stream:
        while state.step < rl.steps:
            drawn = await draw(stream, rl)
            scored = [sample for group in drawn.groups for sample in group]
            batch = collate(scored, pad_id=pad_id)
            check_fresh(batch, state.step, rl.staleness)

            step, stats = state.step + 1, state.rewards
            scores, mismatch = await score(roles, batch, rl, early=collate_scores(scored))
            if broken := non_finite(batch, scores):  # nothing is computed from such a batch
                learned: Metrics = {SKIPPED: 1.0, **broken}
            else:
                limit = rl.sampling.max_new_tokens
                rewards, stats, shaped = shape(batch, rl.shaping, stats, max_new_tokens=limit)
                experience, judged = rl.algorithm.experience(
                    replace(batch, rewards=rewards), scores, state.kl_coef
                )
                learned = await learn(roles, experience, rl, step=step, seed=seed + step)
                learned |= {**shaped, **judged}
            synced = await proof
            proof = await publish(roles, step, probe)

            ages = staleness_shares(batch, state.step, rl.staleness)
            metrics = {**drawn.metrics, **ages, **learned, **mismatch, **synced}
            metrics |= {KL_COEF: state.kl_coef} if state.kl_coef else {}
            metrics |= blamed(scores.get("actor") if mismatch else None, batch, metrics, state.step, probe)
            state = DriverState(step=step, kl_coef=next_kl_coef(rl, state, metrics, batch), rewards=stats)
            ledger.settle(drawn.prompts, step)
            await observer.stepped(state, drawn.groups, batch, metrics)
            stream.release(len(drawn.groups) // at_once)
    await proof


async def learn(roles: Roles, experience: Experience, rl: RL, *, step: int, seed: int) -> Metrics:
    """Every learner steps on the same minibatch at once; one call is one optimizer step, and the call of the
    next waits behind it at the learner, which so never waits for the driver. While the critic warms up, the
    actor is none of them."""
    learners = dict(roles.learners())
    if step <= rl.critic_warmup:
        del learners["actor"]

    async def stepped(minibatch: Minibatch) -> Metrics:
        answers = await asyncio.gather(*(learner.update(minibatch) for learner in learners.values()))
        return {
            f"{role}/{k}": v
            for role, answer in zip(learners, answers, strict=True)
            for k, v in answer.items()
        }

    parts = minibatches(
        experience,
        rl.updates,
        aggregate=rl.updates.aggregate or rl.algorithm.aggregate,
        constant_length=rl.sampling.max_new_tokens,
        seed=seed,
    )
    return mean_metrics(await one_ahead(stepped(part) for part in parts))


async def one_ahead(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their answers in order, each call made while the one before it is under way. When one fails, the next
    is taken back."""
    answers: list[T] = []
    under_way: deque[asyncio.Task[T]] = deque()
    try:
        for call in calls:
            under_way.append(asyncio.create_task(call))
            if len(under_way) > 1:
                answers.append(await under_way.popleft())
        answers += [await task for task in under_way]
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
    return answers


def blamed(actor: Tensor | None, batch: Batch, metrics: Metrics, version: int, probe: Probe) -> Metrics:
    """{"mismatch/<cause>": 1} when the engine's log-probs are further from the trainer's than rounding."""
    mean = metrics.get(ROLLOUT_LOGPROB_DIFF_MEAN, metrics.get(f"actor/{ROLLOUT_LOGPROB_DIFF_MEAN}", 0.0))
    if not math.isfinite(mean):  # numbers.py has spoken of it
        return {}
    cause = mismatch_cause(
        actor, batch, version=version, mean=mean, tolerance=probe.tolerance, probe_diff=metrics["probe_diff"]
    )
    return {} if cause is None else {f"{MISMATCH}{cause}": 1.0}


def next_kl_coef(rl: RL, state: DriverState, metrics: Metrics, batch: Batch) -> float:
    """The controller's answer to this step; a frozen actor or a skipped step tells it nothing."""
    if state.step < rl.critic_warmup or was_skipped(metrics):
        return state.kl_coef
    return rl.algorithm.next_kl_coef(state.kl_coef, metrics, len(batch.tokens))


def check_fresh(batch: Batch, step: int, staleness: int) -> None:
    oldest, newest = batch.versions.where(batch.action_mask, step).aminmax()  # padding is fresh
    if oldest < step - staleness or newest > step:
        drawn = batch.versions[batch.action_mask]
        raise StaleRolloutError(
            f"a batch for step {step + 1} holds rollouts of weight versions {drawn.min()} to {drawn.max()}; "
            f"rl.staleness={staleness} allows {step - staleness} to {step}"
        )
