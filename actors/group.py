"""A role's verbs over N Ray workers: split, call with a deadline, gather. Here is where Ray begins.

    driver --- one await per verb ---> group --- one Ray call per worker ---> workers (collectives among
    themselves)

Every call ends: with an answer, or with a RoleError that names role, rank and verb. Records travel once: the
group puts them into the object store and every worker of every role reads the same copy.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle, ActorMethod
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from actors.recording import Working, recorded
from actors.weights.wire import Address, ServedAdapter, Transport
from orchestrator.balance import plan
from orchestrator.batch import Batch, Examples, Minibatch, Records, Rollout, ScoredRollout
from orchestrator.coalesce import Coalescer
from orchestrator.collate import collate_examples
from orchestrator.config import Deadlines
from orchestrator.examples import Unit
from orchestrator.placement import Seat
from orchestrator.rewards import weigh
from orchestrator.roles import Metrics, Residency, WeightReceipt
from orchestrator.work import WorkBook, WorkLog


class RoleError(RuntimeError):
    """A worker failed, died or did not answer in time."""


class RemoteWorker:
    """One Ray worker with its name, its deadlines and the log of its work."""

    def __init__(self, handle: ActorHandle, who: str, deadlines: Deadlines, log: WorkLog) -> None:
        self.handle, self.who, self.deadlines, self.log = handle, who, deadlines, log

    async def call(self, method: ActorMethod, *args: Any, deadline_s: float | None = None) -> Any:
        verb, limit = method._method_name, deadline_s or self.deadlines.call_s
        try:
            with self.log.call(verb) as unpacked:
                return unpacked(await asyncio.wait_for(method.remote(*args), limit))
        except TimeoutError as error:
            raise RoleError(f"{self.who} did not answer {verb} within {limit:g} s") from error
        except RayTaskError as error:
            raise RoleError(f"{self.who} failed in {verb}: {error.cause!r}") from error
        except RayActorError as error:
            raise RoleError(f"{self.who} died in {verb}: {error}") from error


def spawn(  # noqa: PLR0913 - one line per fact, all by name
    cls: type[Working],
    *,
    who: str,
    seat: Seat,
    group: PlacementGroup,
    env: dict[str, str],
    deadlines: Deadlines,
    book: WorkBook,
    **settings: Any,
) -> RemoteWorker:
    """Starts one worker in its seat; its constructor runs there. Errors surface in the first call."""
    resources = dict(seat.resources)
    options = {
        "num_cpus": resources.get("CPU", 0.0),
        "num_gpus": resources.get("GPU", 0.0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=seat.bundle
        ),
        "runtime_env": {"env_vars": env},
    }
    log = book.enter(who, f"{seat.group}.{seat.bundle}", cls.verbs)
    return RemoteWorker(ray.remote(recorded(cls)).options(**options).remote(**settings), who, deadlines, log)


class ObjectStore:
    """Puts each record once; the last few stay referenced, so that every role of a step finds them there."""

    def __init__(self) -> None:
        self._recent: deque[tuple[Records, ray.ObjectRef]] = deque(maxlen=2)

    def put(self, records: Records) -> ray.ObjectRef:
        for kept, ref in self._recent:
            if kept is records:
                return ref
        ref = ray.put(records)
        self._recent.append((records, ref))
        return ref


class WorkerGroup:
    """What every role's group can do. Rank k is ``workers[k]``."""

    def __init__(self, workers: Sequence[RemoteWorker], *, store: ObjectStore, token_budget: int) -> None:
        self.workers, self._store, self._token_budget = list(workers), store, token_budget

    async def start(self, *, threads: int, seed: int, timeout_s: float) -> None:
        """Joins the workers in one process group and loads the model in each."""
        first = self.workers[0]
        host, port = await first.call(first.handle.rendezvous, deadline_s=first.deadlines.start_s)
        world = len(self.workers)
        await asyncio.gather(
            *(
                w.call(
                    w.handle.setup,
                    rank,
                    world,
                    host,
                    port,
                    threads,
                    seed,
                    timeout_s,
                    deadline_s=w.deadlines.start_s,
                )
                for rank, w in enumerate(self.workers)
            )
        )

    async def health(self) -> None:
        await asyncio.gather(*(w.call(w.handle.health) for w in self.workers))

    async def reside(self, level: Residency) -> None:
        """All ranks leave their devices, or come back."""
        await asyncio.gather(*(w.call(w.handle.reside, level) for w in self.workers))

    async def describe(self) -> list[Any]:
        """One roster line per worker."""
        return await asyncio.gather(*(w.call(w.handle.describe) for w in self.workers))

    async def close(self) -> None:
        """Ends the processes. A worker that is already gone is no error."""
        await asyncio.gather(
            *(w.call(w.handle.close, deadline_s=10) for w in self.workers), return_exceptions=True
        )
        for worker in self.workers:
            ray.kill(worker.handle)

    def _plan(self, lengths: Sequence[int], *, units: Sequence[int] = ()) -> list[list[list[int]]]:
        return plan(lengths, num_ranks=len(self.workers), token_budget=self._token_budget, units=units)


class ScorerGroup(WorkerGroup):
    """Reference, and what learners share with it."""

    def __init__(self, workers: Sequence[RemoteWorker], *, store: ObjectStore, token_budget: int) -> None:
        super().__init__(workers, store=store, token_budget=token_budget)
        self._coming = Coalescer([self._score_rollouts])  # one call at a time: all ranks take part in each

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
        """[T] float32 each."""
        return await self._coming.ask(rollouts)

    async def _score_rollouts(self, rollouts: list[Rollout]) -> list[Tensor]:
        examples = collate_examples([Unit(rows=((r.tokens, r.action_mask),)) for r in rollouts], pad_id=0)
        scores = await self._gather(examples, [self.scoring(worker) for worker in self.workers])
        return [row[: len(rollout.tokens)].clone() for row, rollout in zip(scores, rollouts, strict=True)]

    async def _gather(self, records: Batch | Examples, verbs: Sequence[ActorMethod]) -> Tensor:
        """Every worker answers for its share of the rows; the answers come back in the order of the rows."""
        shares = self._plan(records.attention_mask.sum(1).tolist())
        ref = self._store.put(records)
        calls = zip(self.workers, verbs, shares, strict=True)
        answers = torch.cat(await asyncio.gather(*(w.call(verb, ref, share) for w, verb, share in calls)))
        rows = [row for share in shares for part in share for row in part]
        gathered = torch.empty_like(answers)
        gathered[rows] = answers
        return gathered


@contextmanager
def disk_errors() -> Iterator[None]:
    """A worker's OSError is the driver's too: a full disk is no broken worker."""
    try:
        yield
    except RoleError as error:
        cause = getattr(error.__cause__, "cause", None)
        if isinstance(cause, OSError):
            raise OSError(str(error)) from error
        raise


class LearnerGroup(ScorerGroup):
    """Actor and critic, in every stage that trains them."""

    async def update(self, minibatch: Minibatch) -> Metrics:
        """One optimizer step over all ranks; every rank returns the same global figures."""
        records, rows = minibatch.records, minibatch.rows
        units = [] if records.groups is None else records.groups[rows].tolist()
        shares = self._plan(records.attention_mask[rows].sum(1).tolist(), units=units)
        ref = self._store.put(records)
        answers = await asyncio.gather(
            *(
                w.call(w.handle.update_rows, ref, minibatch.rows, minibatch.weights, share)
                for w, share in zip(self.workers, shares, strict=True)
            )
        )
        return answers[0]

    async def save(self, folder: Path, background: bool = False) -> None:
        with disk_errors():
            await asyncio.gather(*(w.call(w.handle.save, folder, background) for w in self.workers))

    async def saved(self, wait: bool = False) -> bool:
        with disk_errors():
            return all(await asyncio.gather(*(w.call(w.handle.saved, wait) for w in self.workers)))

    async def load(self, folder: Path) -> None:
        await asyncio.gather(*(w.call(w.handle.load, folder) for w in self.workers))

    async def export(self, folder: Path) -> None:
        await asyncio.gather(*(w.call(w.handle.export, folder) for w in self.workers))


class ActorGroup(LearnerGroup):
    """The policy's group: it also sends its weights, answers the probe and exports its average."""

    async def export_average(self, folder: Path) -> None:
        await asyncio.gather(*(w.call(w.handle.export, folder, True) for w in self.workers))

    async def open_channel(
        self,
        transport: Transport,
        dtype: str,
        *,
        bucket_mb: int,
        world_size: int,
        adapter: ServedAdapter | None = None,
    ) -> Address:
        """Where the engines find rank 0; ``world_size`` counts it and every vLLM worker."""
        given = (transport, dtype, bucket_mb, world_size)
        addresses = await asyncio.gather(
            *(w.call(w.handle.open_channel, *given, w.deadlines.sync_s, adapter) for w in self.workers)
        )
        return addresses[0]

    async def send_weights(self, version: int) -> WeightReceipt:
        receipts = await asyncio.gather(
            *(w.call(w.handle.send_weights, version, deadline_s=w.deadlines.sync_s) for w in self.workers)
        )
        return receipts[0]

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        answers = await asyncio.gather(*(w.call(w.handle.logprobs, list(tokens)) for w in self.workers))
        return answers[0]


class RewardLearnerGroup(LearnerGroup):
    """Trains a reward model; its score is one number per sequence."""

    async def score(self, batch: Batch | Examples) -> Tensor:
        """[B] scores, row for row."""
        return await self._gather(batch, [worker.handle.score for worker in self.workers])

    async def keep_statistics(self, mean: float, std: float) -> None:
        """Into the configuration of the model that ``export`` writes."""
        await asyncio.gather(*(w.call(w.handle.keep_statistics, mean, std) for w in self.workers))


class RewardGroup(WorkerGroup):
    """Scores finished groups of rollouts. What waits while every worker is busy goes to one in one call."""

    def __init__(
        self,
        workers: Sequence[RemoteWorker],
        *,
        store: ObjectStore,
        token_budget: int,
        weights: Mapping[str, float],
    ) -> None:
        """``weights``: of each reward, by name."""
        super().__init__(workers, store=store, token_budget=token_budget)
        self._weights = weights
        self._coming = Coalescer([partial(self._ask, worker) for worker in self.workers])

    async def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Raises RewardError for a reward that is missing or not finite."""
        return weigh(rollouts, await self._coming.ask(rollouts), self._weights)

    async def _ask(self, worker: RemoteWorker, rollouts: list[Rollout]) -> list[dict[str, float | None]]:
        """{name: reward} of each rollout, None where a reward is missing."""
        rewards = await worker.call(worker.handle.score_rollouts, rollouts)
        return [
            {name: values[row] if row < len(values) else None for name, values in rewards.items()}
            for row in range(len(rollouts))
        ]
