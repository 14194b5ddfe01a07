"""The handles of four roles over one group of workers: the loop sees the roles it always sees.

    actor.update(m) ---+
                       +--> one update of the workers: one pass, one optimizer step, both losses
    critic.update(m) --+

Whoever of the two comes first waits for the other, at most its deadline.
"""

import asyncio
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from ray.actor import ActorMethod
from torch import Tensor

from actors.errors import RoleError
from actors.group import ActorGroup, LearnerGroup, ScorerGroup
from actors.remote_worker import RemoteWorker
from orchestrator.batch import Batch, Minibatch, Rollout, ScoredRollout
from orchestrator.coalesce import Coalescer, portions
from orchestrator.config import MODEL
from orchestrator.rewards import by_row, weigh
from orchestrator.roles import Metrics

LEARNERS = ("actor", "critic")


class BackboneGroup(ActorGroup):
    """As the actor. It owns the workers: the other handles neither start nor end them."""

    meeting: "Meeting | None" = None  # with the critic, where there is one

    def with_critic(self) -> "BackboneCritic":
        self.meeting = Meeting(self)
        return BackboneCritic(self)

    async def update(self, minibatch: Minibatch) -> Metrics:
        if self.meeting is None:
            return await super().update(minibatch)
        return await self.meeting.update("actor", minibatch)


class Meeting:
    """Actor and critic step together on the same minibatch."""

    def __init__(self, group: BackboneGroup) -> None:
        self._group = group
        self._first: tuple[str, Minibatch, asyncio.Future[Metrics]] | None = None

    async def update(self, role: str, minibatch: Minibatch) -> Metrics:
        """The figures of one role. RoleError when the other does not come with the same minibatch."""
        if self._first is None:
            answer: asyncio.Future[Metrics] = asyncio.get_running_loop().create_future()
            self._first = (role, minibatch, answer)
            limit = self._group.workers[0].deadlines.call_s
            try:
                return figures_of(role, await asyncio.wait_for(answer, limit))
            except TimeoutError as error:
                raise RoleError(f"the shared backbone got no update from the other of {LEARNERS}") from error
        other, theirs, answer = self._first
        self._first = None
        if other == role or theirs is not minibatch:
            error = RoleError(
                f"the shared backbone was updated by {other} and {role} on different minibatches"
            )
            answer.set_exception(error)
            raise error
        (outcome,) = await asyncio.gather(LearnerGroup.update(self._group, minibatch), return_exceptions=True)
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
            raise outcome
        answer.set_result(outcome)
        return figures_of(role, outcome)


def figures_of(role: str, metrics: Metrics) -> Metrics:
    """What concerns a role in the figures of a joint step; ``loss`` is its own.

    >>> figures_of("actor", {"loss": 1.1, "grad_norm": 2.0, "actor/loss": 1.0, "critic/loss": 1.0})
    {'loss': 1.0, 'grad_norm': 2.0}
    """
    common = {name: value for name, value in metrics.items() if "/" not in name}
    own = {n.removeprefix(f"{role}/"): v for n, v in metrics.items() if n.startswith(f"{role}/")}
    return common | own


class Guest(ScorerGroup):
    """A role in another's workers, which are lost and replaced together with their state."""

    replaceable = False

    def __init__(self, host: BackboneGroup) -> None:
        super().__init__(host.workers, store=host._store, token_budget=host._token_budget)
        self.overhead = host.overhead

    async def close(self) -> None:
        """Its host ends the workers."""


class BackboneCritic(Guest):
    """Its head is saved with the actor, whose optimizer steps it."""

    def __init__(self, host: BackboneGroup) -> None:
        super().__init__(host)
        self._host = host

    def scoring(self, worker: RemoteWorker) -> ActorMethod:
        return worker.handle.score_values

    async def update(self, minibatch: Minibatch) -> Metrics:
        assert self._host.meeting is not None
        return await self._host.meeting.update("critic", minibatch)

    async def save(self, folder: Path, background: bool = False) -> None: ...
    async def saved(self, wait: bool = False) -> bool:
        return True

    async def load(self, folder: Path) -> None: ...
    async def export(self, folder: Path) -> None: ...


class BackboneReference(Guest):
    def scoring(self, worker: RemoteWorker) -> ActorMethod:
        return worker.handle.score_reference

    async def distributions(self, batch: Batch) -> Tensor:
        """[B, T, V] float32, row for row."""
        return await self._gather(batch, [worker.handle.reference_distributions for worker in self.workers])


class BackboneReward(Guest):
    """All ranks score together, as they share one model. What waits while they do goes in one call."""

    def __init__(self, host: BackboneGroup, weights: Mapping[str, float], functions: Sequence[str]) -> None:
        """``weights``: of each reward by name; ``functions``: the names of those that are functions."""
        super().__init__(host)
        self._weights, self._functions = weights, functions
        self._rollouts = Coalescer([self._judged])

    async def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:  # type: ignore[override]
        """Raises RewardError for a reward that is missing or not finite."""
        return weigh(rollouts, await self._rollouts.ask(rollouts), self._weights)

    async def _judged(self, groups: Sequence[Sequence[Rollout]]) -> list[list[dict[str, float | None]]]:
        """{name: reward} of each rollout."""
        found: dict[str, list[float]] = {}
        rollouts = list(chain.from_iterable(groups))
        first = self.workers[0]
        if self._functions:
            found |= await first.call(first.handle.judge, rollouts)
        if MODEL in self._weights:
            verbs = [worker.handle.score_rewards for worker in self.workers]
            found[MODEL] = (await self._gather_apart(groups, verbs)).tolist()
        return portions(by_row(found, len(rollouts)), groups)
