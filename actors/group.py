"""A role's verbs over N Ray workers: split, call with a deadline, gather.

    driver --- one await per verb ---> group --- one Ray call per worker ---> workers (collectives among
    themselves)

Every call ends: with an answer, or with a RoleError that names role, rank and verb. Records travel once: the
group puts them into the object store and every worker of every role reads the same copy.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from ray.actor import ActorMethod
from torch import Tensor

from actors.all_ranks import all_ranks
from actors.budget import Budget
from actors.errors import WorkerLost, disk_errors
from actors.object_store import ObjectStore
from actors.remote_worker import RemoteWorker
from actors.weights.wire import Address, Channel
from orchestrator.balance import FEWEST, plan, plan_apart
from orchestrator.batch import Batch, Examples, Minibatch, Rollout, ScoredRollout
from orchestrator.coalesce import Coalescer, portions
from orchestrator.collate import collate_examples
from orchestrator.examples import Unit
from orchestrator.rewards import by_row, weigh
from orchestrator.roles import Metrics, Residency, WeightReceipt


class WorkerGroup:
    """What every role's group can do. Rank k is ``workers[k]``."""

    replaceable: ClassVar[bool] = False  # a lost worker gets a successor at once and is asked again

    def __init__(
        self, workers: Sequence[RemoteWorker], *, store: ObjectStore, token_budget: int, restarts: int = 0
    ) -> None:
        """``restarts`` of each worker within an hour."""
        self.workers, self._store, self._token_budget = list(workers), store, token_budget
        self.overhead, self._budgets = FEWEST, [Budget(restarts) for _ in self.workers]
        self._replacing = asyncio.Lock()

    async def start(self, *, threads: int, seed: int, timeout_s: float, overhead: int = FEWEST) -> None:
        """Joins the workers in one process group, loads the models; ``overhead``: of a micro-batch there."""
        self._settings, self.overhead = (threads, seed, timeout_s), overhead
        await self._join(self.workers)

    async def _join(self, workers: Sequence[RemoteWorker]) -> None:
        """``workers``: all, or one whose ranks never talk to each other."""
        ranks = [self.workers.index(worker) for worker in workers]
        await self._describe(workers, ranks, ready=False)
        first, world = workers[0], len(self.workers)
        host, port = await first.call(first.handle.rendezvous)
        await all_ranks(
            w.call(w.handle.setup, rank, world, host, port, *self._settings, deadline_s=w.deadlines.start_s)
            for w, rank in zip(workers, ranks, strict=True)
        )
        await self._describe(workers, ranks, ready=True)

    async def _describe(self, workers: Sequence[RemoteWorker], ranks: Sequence[int], *, ready: bool) -> None:
        lines = await all_ranks(w.call(w.handle.describe, deadline_s=w.deadlines.start_s) for w in workers)
        for worker, rank, line in zip(workers, ranks, lines, strict=True):
            worker.attend([replace(line, rank=rank)], ready=ready)

    async def _ask(self, worker: RemoteWorker, verb: ActorMethod, *args: Any) -> Any:
        """As ``call``; where the group is replaceable, a lost worker's successor is asked the same."""
        while True:
            incarnation = worker.incarnation
            try:
                return await worker.call(getattr(worker.handle, verb._method_name), *args)
            except WorkerLost as lost:
                if not self.replaceable:
                    raise
                async with self._replacing:
                    if worker.incarnation == incarnation:
                        await self._succeed([worker], str(lost))

    async def _succeed(self, workers: Sequence[RemoteWorker], why: str) -> None:
        """Successors of these workers, ready, with the weights they started from."""
        while True:
            for worker in workers:
                if not self._budgets[self.workers.index(worker)].take():
                    raise worker.give_up(why)
            for worker in workers:
                worker.revive()
            try:
                await self._join(workers)
            except WorkerLost as lost:
                why = str(lost)
                continue
            for worker in workers:
                worker.recovered()
            return

    async def health(self) -> None:
        await asyncio.gather(*(w.call(w.handle.health) for w in self.workers))

    async def reside(self, level: Residency) -> None:
        """All ranks leave their devices, or come back. One that is lost has left; its group says so when it
        is asked for more than this, or it has a successor at once."""
        here = [w for w in self.workers if self.replaceable or not w.lost]
        await all_ranks(self._ask(w, w.handle.reside, level) for w in here)

    async def close(self) -> None:
        """Ends the processes. A worker that is already gone is no error."""
        ends = (w.call(w.handle.close, deadline_s=10) for w in self.workers)
        await asyncio.gather(*ends, return_exceptions=True)
        for worker in self.workers:
            worker.dismiss()

    def _plan(self, lengths: Sequence[int], *, units: Sequence[int] = ()) -> list[list[list[int]]]:
        ranks, budget = len(self.workers), self._token_budget
        return plan(lengths, num_ranks=ranks, token_budget=budget, units=units, overhead=self.overhead)


class ScorerGroup(WorkerGroup):
    """Reference, and what learners share with it."""

    replaceable = True

    def __init__(
        self, workers: Sequence[RemoteWorker], *, store: ObjectStore, token_budget: int, restarts: int = 0
    ) -> None:
        super().__init__(workers, store=store, token_budget=token_budget, restarts=restarts)
        self._coming = Coalescer([self._score_groups])  # one call at a time: all ranks take part in each

    async def score(self, batch: Batch | Examples) -> Tensor:
        """[B, T] float32, row for row."""
        return await self._gather(batch, [self.scoring(worker) for worker in self.workers])

    def scoring(self, worker: RemoteWorker) -> ActorMethod:
        """The verb of a worker that answers ``score``."""
        return worker.handle.score

    async def distributions(self, batch: Batch) -> Tensor:
        """[B, T, V] float32, row for row; actor and reference have it."""
        return await self._gather(batch, [worker.handle.distributions for worker in self.workers])

    async def score_rollouts(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """[T] float32 each, the same bits whoever else is scored meanwhile."""
        return await self._coming.ask(rollouts)

    async def _score_groups(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Tensor]]:
        scores = await self._gather_apart(groups, [self.scoring(worker) for worker in self.workers])
        rows = chain.from_iterable(groups)
        own = [row[: len(rollout.tokens)].clone() for row, rollout in zip(scores, rows, strict=True)]
        return portions(own, groups)

    async def _gather_apart(
        self, groups: Sequence[Sequence[Rollout]], verbs: Sequence[ActorMethod]
    ) -> Tensor:
        """Every worker answers for some of the groups, each in micro-batches of its own: a row's company must
        not depend on which groups happened to be finished, for it changes the last bits of its figures."""
        rollouts = list(chain.from_iterable(groups))
        records = collate_examples([Unit(rows=((r.tokens, r.action_mask),)) for r in rollouts], pad_id=0)
        lengths, sizes = [len(r.tokens) for r in rollouts], [len(group) for group in groups]
        ranks, budget = len(self.workers), self._token_budget
        shares = plan_apart(lengths, sizes, num_ranks=ranks, token_budget=budget, overhead=self.overhead)
        return await self._answers(records, verbs, shares)

    async def _gather(self, records: Batch | Examples, verbs: Sequence[ActorMethod]) -> Tensor:
        """Every worker answers for its share of the rows."""
        groups = records.groups if isinstance(records, Examples) else None  # what begins alike stays together
        units = [] if groups is None else groups.tolist()
        shares = self._plan(records.attention_mask.sum(1).tolist(), units=units)
        return await self._answers(records, verbs, shares)

    async def _answers(
        self, records: Batch | Examples, verbs: Sequence[ActorMethod], shares: Sequence[Sequence[list[int]]]
    ) -> Tensor:
        """``shares``: micro-batches of each worker. The answers come back in the order of the rows."""
        ref = self._store.put(records)
        calls = zip(self.workers, verbs, shares, strict=True)
        answers = torch.cat(await all_ranks(self._ask(w, verb, ref, share) for w, verb, share in calls))
        rows = [row for share in shares for part in share for row in part]
        gathered = torch.empty_like(answers)
        gathered[rows] = answers
        return gathered


class LearnerGroup(ScorerGroup):
    """Actor and critic, in every stage that trains them. A lost rank leaves the others in a collective and
    with other weights than its own: who owns the group rebuilds all of it and loads a checkpoint."""

    replaceable = False

    @property
    def lost(self) -> bool:
        return any(worker.lost for worker in self.workers)

    async def rebuild(self) -> None:
        """Successors of all ranks, with the weights the group started from."""
        await self._succeed(self.workers, "its group is rebuilt")

    async def update(self, minibatch: Minibatch) -> Metrics:
        """One optimizer step over all ranks; every rank returns the same global figures."""
        records, rows = minibatch.records, minibatch.rows
        units = [] if records.groups is None else records.groups[rows].tolist()
        shares = self._plan(records.attention_mask[rows].sum(1).tolist(), units=units)
        ref = self._store.put(records)
        answers = await all_ranks(
            (
                w.call(w.handle.update_rows, ref, rows.numpy(), minibatch.weights.numpy(), share)
                for w, share in zip(self.workers, shares, strict=True)
            )
        )
        return answers[0]

    async def save(self, folder: Path, background: bool = False) -> None:
        with disk_errors():
            await all_ranks(w.call(w.handle.save, folder, background) for w in self.workers)

    async def saved(self, wait: bool = False) -> bool:
        with disk_errors():
            return all(await all_ranks(w.call(w.handle.saved, wait) for w in self.workers))

    async def load(self, folder: Path) -> None:
        await all_ranks(w.call(w.handle.load, folder) for w in self.workers)

    async def export(self, folder: Path) -> None:
        await all_ranks(w.call(w.handle.export, folder) for w in self.workers)


class ActorGroup(LearnerGroup):
    """The policy's group: it also sends its weights, answers the probe and exports its average."""

    def __init__(
        self,
        workers: Sequence[RemoteWorker],
        *,
        store: ObjectStore,
        token_budget: int,
        restarts: int = 0,
        channel: Channel | None = None,
    ) -> None:
        """``channel`` None: this stage has no engines."""
        super().__init__(workers, store=store, token_budget=token_budget, restarts=restarts)
        self.channel = channel

    async def export_average(self, folder: Path) -> None:
        await all_ranks(w.call(w.handle.export, folder, True) for w in self.workers)

    async def open_channel(self, num_receivers: int) -> Address:
        """Where so many vLLM workers find rank 0; replaces the channel before."""
        assert self.channel is not None  # only the rl stage sends weights
        setting = self.channel
        addresses = await all_ranks(
            w.call(
                w.handle.open_channel,
                setting.transport,
                setting.dtype,
                setting.bucket_mb,
                1 + num_receivers,
                w.deadlines.stall_s,
                setting.adapter,
                deadline_s=w.deadlines.sync_s,
            )
            for w in self.workers
        )
        return addresses[0]

    async def send_weights(self, version: int) -> WeightReceipt:
        receipts = await all_ranks(
            w.call(w.handle.send_weights, version, deadline_s=w.deadlines.sync_s) for w in self.workers
        )
        return receipts[0]

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        answers = await all_ranks(w.call(w.handle.logprobs, list(tokens)) for w in self.workers)
        return answers[0]


class RewardLearnerGroup(LearnerGroup):
    """Trains a reward model; its score is one number per sequence."""

    async def score(self, batch: Batch | Examples) -> Tensor:
        """[B] scores, row for row."""
        return await self._gather(batch, [worker.handle.score for worker in self.workers])

    async def keep_statistics(self, mean: float, std: float) -> None:
        """Into the configuration of the model that ``export`` writes."""
        await all_ranks(w.call(w.handle.keep_statistics, mean, std) for w in self.workers)


class RewardGroup(WorkerGroup):
    """Scores finished groups of rollouts. What waits while every worker is busy goes to one in one call."""

    replaceable = True

    def __init__(
        self,
        workers: Sequence[RemoteWorker],
        *,
        store: ObjectStore,
        token_budget: int,
        weights: Mapping[str, float],
        restarts: int = 0,
    ) -> None:
        """``weights``: of each reward, by name."""
        super().__init__(workers, store=store, token_budget=token_budget, restarts=restarts)
        self._weights = weights
        self._coming = Coalescer([partial(self._judge, worker) for worker in self.workers])

    async def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Raises RewardError for a reward that is missing or not finite."""
        return weigh(rollouts, await self._coming.ask(rollouts), self._weights)

    async def _judge(
        self, worker: RemoteWorker, groups: Sequence[Sequence[Rollout]]
    ) -> list[list[dict[str, float | None]]]:
        """{name: reward} of each rollout, None where a reward is missing."""
        rewards = await self._ask(worker, worker.handle.score_groups, groups)
        return portions(by_row(rewards, sum(map(len, groups))), groups)
