"""The roles of a run as the driver sees them, with service times in place of models: what ``loop.py`` is run
against to see its schedule.

A simulated sequence has two tokens: the first says how long its prompt is, the second how long its response.
So the loop stacks, shuffles and cuts real records, and every role reads the lengths off the rows it is given,
each for as many ``copies`` as it stands for (cast.py).

    SimulatedFleet    prompts to the engine with the least work, as actors/fleet.py
    SimulatedEngine   a queue of requests over a batch with a limit: admit, prefill, decode, let go
    SimulatedScorer   reference; SimulatedLearner: critic; SimulatedPolicy: actor. Calls that wait become one
    SimulatedReward   its workers take what waits
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.batch import Batch, Minibatch, Prompt, Rollout, ScoredRollout, StopReason
from orchestrator.coalesce import Coalescer
from orchestrator.config import Optimizer
from orchestrator.ledger import sample_seed
from orchestrator.plan.service import Service
from orchestrator.plan.virtual import Place
from orchestrator.plan.workload import Workload
from orchestrator.roles import Metrics, Policy, Residency, Sampling, WeightReceipt

MOMENT = 1e-6  # seconds of an idle engine in which it gets all that is sent at one time
CHUNKS = 24  # looks of an engine at its queue in the longest response; more only cost time


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Where a role's workers are. Workers that do the same side by side on devices of their own are one
    place."""

    places: tuple[Place, ...]
    demand: float  # of a place's capacity, by each worker

    async def work(self, seconds: float, phase: str) -> None:
        """All workers, until the last is done."""
        if len(self.places) == 1:
            await self.places[0].work(seconds, phase, self.demand)
        else:
            await asyncio.gather(*(place.work(seconds, phase, self.demand) for place in self.places))


HOST_LINK = 25e9  # bytes/s between a device and its host's memory: half of what PCIe 5 x16 carries


class _Alive:
    """Health and close: nothing to check or end. ``resident_bytes`` are what moves when it leaves the
    device."""

    resident_bytes = 0.0

    async def reside(self, level: Residency) -> None:
        await asyncio.sleep(self.resident_bytes / HOST_LINK)

    async def health(self) -> None:
        pass

    async def close(self) -> None:
        pass


Lengths = tuple[list[int], list[int]]  # of whole sequences, of their responses


def _lengths(records: Tensor, copies: int) -> Lengths:
    """Of records [n, 2], each counted ``copies`` times."""
    return records.sum(1).tolist() * copies, records[:, 1].tolist() * copies


def _group_lengths(groups: Sequence[Sequence[Rollout]], copies: int) -> list[Lengths]:
    """Of each group, ``copies`` times."""
    return [([sum(r.tokens) for r in group], [r.tokens[1] for r in group]) for group in groups] * copies


class SimulatedScorer(_Alive):
    def __init__(self, seats: Seats, service: Service, *, copies: int) -> None:
        self.seats, self.service, self.copies = seats, service, copies
        self._coming = Coalescer([self._score_groups])
        self._turn = asyncio.Lock()

    async def _work(self, seconds: float, phase: str) -> None:
        """One call at a time, in the order in which they were asked."""
        async with self._turn:
            await self.seats.work(seconds, phase)

    async def score(self, batch: Batch) -> Tensor:
        await self._forward(batch.tokens)
        return torch.zeros(batch.tokens.shape)

    async def distributions(self, batch: Batch) -> Tensor:
        await self._forward(batch.tokens)
        return torch.zeros(*batch.tokens.shape, int(batch.tokens.max()) + 1)

    async def score_rollouts(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        return await self._coming.ask(rollouts)

    async def _score_groups(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Tensor]]:
        await self._work(self.service.forward_apart(_group_lengths(groups, self.copies)), "score")
        return [[torch.zeros(2) for _ in group] for group in groups]

    async def _forward(self, tokens: Tensor) -> None:
        await self._work(self.service.forward(*_lengths(tokens, self.copies)), "score")


class SimulatedLearner(SimulatedScorer):
    def __init__(self, seats: Seats, service: Service, optimizer: Optimizer, *, copies: int) -> None:
        super().__init__(seats, service, copies=copies)
        self.optimizer = optimizer

    async def update(self, minibatch: Minibatch) -> Metrics:
        lengths = _lengths(minibatch.records.tokens[minibatch.rows], self.copies)
        await self._work(self.service.update(*lengths, self.optimizer), "update")
        return {}

    async def saved(self, wait: bool = False) -> bool:
        return True

    async def save(self, folder: Path, background: bool = False) -> None:
        pass

    async def load(self, folder: Path) -> None:
        pass

    async def export(self, folder: Path) -> None:
        pass


class SimulatedPolicy(SimulatedLearner):
    def __init__(
        self, seats: Seats, service: Service, optimizer: Optimizer, *, engines: int, copies: int
    ) -> None:
        super().__init__(seats, service, optimizer, copies=copies)
        self.engines = engines

    async def open_channel(self, num_receivers: int) -> None:
        pass

    async def send_weights(self, version: int) -> WeightReceipt:
        await self._work(self.service.sync(self.engines), "sync")
        return WeightReceipt(
            version=version, checksums={}, who="actor", num_bytes=self.service.shape.params * 2
        )

    async def export_average(self, folder: Path) -> None:
        pass

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        await self._work(self.service.forward([len(tokens)], [len(tokens)]), "probe")
        return [0.0]


class SimulatedReward(_Alive):
    """A model, or functions that take no time; each worker answers one call at a time, of all that waits."""

    def __init__(self, workers: Sequence[Seats], service: Service | None, *, seed: int, copies: int) -> None:
        self.service, self._seed, self.copies = service, seed, copies
        self._coming = Coalescer([self._server(seats) for seats in workers])

    def _server(
        self, seats: Seats
    ) -> Callable[[list[Sequence[Rollout]]], Awaitable[Sequence[list[ScoredRollout]]]]:
        async def answer(groups: list[Sequence[Rollout]]) -> list[list[ScoredRollout]]:
            if self.service is not None:
                apart = self.service.forward_apart(_group_lengths(groups, self.copies))
                await seats.work(apart, "reward")
            return [[ScoredRollout(rollout=r, reward=self._judged(r)) for r in group] for group in groups]

        return answer

    def _judged(self, rollout: Rollout) -> float:
        """A coin: half of the answers are right."""
        return float(sample_seed(self._seed, rollout.uid) % 2)

    async def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        return await self._coming.ask(rollouts)


@dataclass(slots=True)
class _Request:
    prompt: int
    left: int  # tokens still to come
    made: int
    done: asyncio.Future[None]


class SimulatedEngine:
    """One replica. At most ``max_num_seqs`` requests run, and at most what the cache holds; the others
    wait."""

    def __init__(self, seats: Seats, service: Service, *, max_num_seqs: int, cache_tokens: float) -> None:
        self.seats, self.service = seats, service
        self.max_num_seqs, self.cache_tokens = max_num_seqs, cache_tokens
        self.load = 0  # samples asked for and not yet answered
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._serving: asyncio.Task[None] | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._prefilled_again = 0

    async def sample(self, prompt: int, responses: Sequence[int]) -> None:
        """One request each; returns when the last has ended."""
        loop = asyncio.get_running_loop()
        mine = [_Request(prompt, length, 0, loop.create_future()) for length in responses]
        self._waiting.extend(mine)
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        await asyncio.gather(*(request.done for request in mine))

    async def _serve(self) -> None:
        await self.seats.work(MOMENT, "generate")
        while self._waiting or self._running:
            await self._open.wait()
            seconds = self._admit()
            chunk = min(request.left for request in self._running)
            if self._waiting or len(self._running) < self.max_num_seqs:  # somebody may come in meanwhile
                chunk = min(chunk, max(1, self._longest() // CHUNKS))
            context = sum(r.prompt + r.made + chunk / 2 for r in self._running) / len(self._running)
            seconds += chunk * self.service.decode(len(self._running), context)
            await self.seats.work(seconds, "generate")
            self._advance(chunk)

    def _longest(self) -> int:
        return max(request.left + request.made for request in self._running)

    def _admit(self) -> float:
        """Seconds to prefill who comes in; siblings of a prompt share its prefill."""
        used = sum(r.prompt + r.made + r.left for r in self._running)
        requests, tokens, last, longest = 0, self._prefilled_again, -1, 1
        self._prefilled_again = 0
        while self._waiting and len(self._running) < self.max_num_seqs:
            head = self._waiting[0]
            used += head.prompt + head.left
            if self._running and used > self.cache_tokens:
                break
            self._running.append(self._waiting.popleft())
            requests += 1
            tokens += head.prompt if head.prompt != last else 0
            last, longest = head.prompt, max(longest, head.prompt)
        return self.service.prefill(tokens, requests, longest) if requests or tokens else 0.0

    def _advance(self, chunk: int) -> None:
        for request in self._running:
            request.made += chunk
            request.left -= chunk
        ended = [request for request in self._running if request.left <= 0]
        self._running = [request for request in self._running if request.left > 0]
        for request in ended:
            if not request.done.done():
                request.done.set_result(None)

    async def update(self, seconds: float) -> None:
        """Nothing runs meanwhile; what was running is prefilled again, its cache was of the old weights."""
        self._open.clear()
        await self.seats.work(seconds, "sync")
        self._prefilled_again = sum(request.prompt + request.made for request in self._running)
        self._open.set()


class SimulatedFleet(_Alive):
    def __init__(
        self, engines: Sequence[SimulatedEngine], workload: Workload, *, seed: int, sync_s: float
    ) -> None:
        self.engines, self.workload, self.seed, self.sync_s = list(engines), workload, seed, sync_s
        self.version, self.generated = 0, 0

    async def generate(self, prompt: Prompt, num_samples: int, sampling: Sampling) -> list[Rollout]:
        lengths = [
            self.workload.draw(random.Random(sample_seed(self.seed, f"{prompt.uid}/{k}")))
            for k in range(num_samples)
        ]
        version = self.version
        engine = min(self.engines, key=lambda each: each.load)
        engine.load += num_samples
        try:
            await engine.sample(prompt.tokens[0], lengths)
        finally:
            engine.load -= num_samples
        self.generated += sum(lengths)
        return [_rollout(prompt, k, length, version) for k, length in enumerate(lengths)]

    async def prepare_weights(
        self, policy: Policy, version: int
    ) -> list[tuple[WeightReceipt, WeightReceipt]]:
        updates = asyncio.gather(*(engine.update(self.sync_s) for engine in self.engines))
        sent, _ = await asyncio.gather(policy.send_weights(version), updates)
        return [(sent, WeightReceipt(version=version, checksums={}, who="engine", num_bytes=0))]

    async def commit_weights(self, version: int) -> None:
        self.version = version

    async def logprobs(self, tokens: Sequence[int]) -> list[list[float]]:
        """A request of one token among the others, on every engine."""
        await asyncio.gather(*(engine.sample(len(tokens), [1]) for engine in self.engines))
        return [[0.0] for _ in self.engines]


def _rollout(prompt: Prompt, sample: int, length: int, version: int) -> Rollout:
    return Rollout(
        uid=f"{prompt.uid}/{sample}", prompt=prompt, tokens=(prompt.tokens[0], length), action_mask=(False,
        True), logprobs=(0.0, 0.0), text="", versions=(version, version), stop=StopReason.EOS,
    )  # fmt: skip
