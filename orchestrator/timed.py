"""Wraps every handle of a run once, at build time, so that each verb is a span on the timeline and no verb
measures itself.

Deleting this file costs the ``seconds/*`` metrics and nothing else: a wrapped role answers exactly what its
handle does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from orchestrator.batch import Batch, Minibatch, Prompt, Rollout, ScoredRollout
from orchestrator.roles import (
    Engine,
    Learner,
    Metrics,
    Policy,
    PolicyScorer,
    Reward,
    Role,
    Roles,
    Sampling,
    Scorer,
    WeightReceipt,
)
from orchestrator.timeline import Phase, Timeline

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R", bound=Role)
S = TypeVar("S", bound=Scorer)
L = TypeVar("L", bound=Learner)


def timed(roles: Roles, timeline: Timeline) -> Roles:
    """The same roles, each recording its calls under its name."""
    return Roles(
        actor=TimedPolicy("actor", roles.actor, timeline),
        engine=TimedEngine("engine", roles.engine, timeline),
        reward=TimedReward("reward", roles.reward, timeline),
        critic=None if roles.critic is None else TimedLearner("critic", roles.critic, timeline),
        reference=None if roles.reference is None else TimedReference("reference", roles.reference, timeline),
    )


class _Timed(Generic[R]):
    """``health`` and ``close`` are not work of a step and are not recorded."""

    def __init__(self, name: str, handle: R, timeline: Timeline) -> None:
        self.name, self.handle, self.timeline = name, handle, timeline

    async def health(self) -> None:
        await self.handle.health()

    async def close(self) -> None:
        await self.handle.close()


class TimedScorer(_Timed[S]):
    async def score(self, batch: Batch) -> Tensor:
        with self.timeline.span(self.name, Phase.SCORE):
            return await self.handle.score(batch)

    async def score_rollouts(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        with self.timeline.span(self.name, Phase.SCORE):
            return await self.handle.score_rollouts(rollouts)


class TimedReference(TimedScorer[PolicyScorer]):
    async def distributions(self, batch: Batch) -> Tensor:
        with self.timeline.span(self.name, Phase.SCORE):
            return await self.handle.distributions(batch)


class TimedLearner(TimedScorer[L]):
    async def update(self, minibatch: Minibatch) -> Metrics:
        with self.timeline.span(self.name, Phase.UPDATE):
            return await self.handle.update(minibatch)

    async def save(self, folder: Path, background: bool = False) -> None:
        with self.timeline.span(self.name, Phase.SAVE):
            await self.handle.save(folder, background)

    async def saved(self, wait: bool = False) -> bool:
        with self.timeline.span(self.name, Phase.SAVE):
            return await self.handle.saved(wait)

    async def load(self, folder: Path) -> None:
        with self.timeline.span(self.name, Phase.LOAD):
            await self.handle.load(folder)

    async def export(self, folder: Path) -> None:
        with self.timeline.span(self.name, Phase.SAVE):
            await self.handle.export(folder)


class TimedPolicy(TimedLearner[Policy]):
    async def distributions(self, batch: Batch) -> Tensor:
        with self.timeline.span(self.name, Phase.SCORE):
            return await self.handle.distributions(batch)

    async def export_average(self, folder: Path) -> None:
        with self.timeline.span(self.name, Phase.SAVE):
            await self.handle.export_average(folder)

    async def open_channel(self, num_receivers: int) -> Any:
        with self.timeline.span(self.name, Phase.SYNC):
            return await self.handle.open_channel(num_receivers)

    async def send_weights(self, version: int) -> WeightReceipt:
        with self.timeline.span(self.name, Phase.SYNC):
            return await self.handle.send_weights(version)

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        with self.timeline.span(self.name, Phase.PROBE):
            return await self.handle.logprobs(tokens)


class TimedEngine(_Timed[Engine]):
    async def generate(self, prompt: Prompt, num_samples: int, sampling: Sampling) -> list[Rollout]:
        with self.timeline.span(self.name, Phase.GENERATE):
            return await self.handle.generate(prompt, num_samples, sampling)

    async def prepare_weights(
        self, policy: Policy, version: int
    ) -> list[tuple[WeightReceipt, WeightReceipt]]:
        with self.timeline.span(self.name, Phase.SYNC):
            return await self.handle.prepare_weights(policy, version)

    async def commit_weights(self, version: int) -> None:
        with self.timeline.span(self.name, Phase.SYNC):
            await self.handle.commit_weights(version)

    async def logprobs(self, tokens: Sequence[int]) -> list[list[float]]:
        with self.timeline.span(self.name, Phase.PROBE):
            return await self.handle.logprobs(tokens)


class TimedReward(_Timed[Reward]):
    async def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        with self.timeline.span(self.name, Phase.REWARD):
            return await self.handle.score(rollouts)
