"""Roles that only take their time: what is measured with them is the driver, and Ray between it and them.

Workers of the real classes' shape behind the real groups and the real fleet, in Ray or in this process. An
engine answers a group after ``generate_s``, at most ``slots`` groups at once; scores and updates take
``score_s`` and ``update_s`` a call. Their answers have the real sizes, so that they cost the driver what real
ones do.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.vital_signs import RosterLine, VitalSigns
from actors.weights.wire import Address, ServedAdapter, Transport
from actors.worker import Worker
from orchestrator.batch import Batch, Minibatch, Prompt, Rollout, ScoredRollout, StopReason
from orchestrator.roles import Metrics, Sampling, WeightReceipt
from orchestrator.work import Work

PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How long a call takes, in seconds, and how long a response is."""

    response_tokens: int = 128
    generate_s: float = 0.0
    slots: int = 1_000_000
    score_s: float = 0.0
    update_s: float = 0.0
    distinct: bool = True  # every response is made anew, as what comes from another process is


def prompts(count: int) -> list[Prompt]:
    tokens = tuple(range(3, 3 + PROMPT_TOKENS))
    return [Prompt(uid=f"0/{row}", row=row, tokens=tokens, text="", label=None) for row in range(count)]


Columns = tuple[tuple[int, ...], tuple[bool, ...], tuple[float, ...], tuple[int, ...]]


def columns(asked: tuple[int, ...], length: int, first: int, version: int) -> Columns:
    """Tokens, action mask, log-probs and versions of a response that counts on from ``first``."""
    return (
        asked + tuple(range(first, first + length)),
        (False,) * len(asked) + (True,) * length,
        (0.0,) * len(asked) + tuple(-1.0 / (i + 1) for i in range(length)),
        (0,) * len(asked) + (version,) * length,
    )


_known_columns = lru_cache(maxsize=4)(columns)


class SimulatedEngine(VitalSigns):
    """An ``EngineWorker`` to the fleet."""

    verbs: ClassVar[dict[str, Work]] = {
        "generate": Work.GENERATE,
        "receive_weights": Work.RECEIVE,
        "logprobs": Work.PROBE,
    }
    service: ClassVar[Service] = Service()

    def __init__(self, *, index: int) -> None:
        self._index, self._version = index, 0
        self._slots = asyncio.Semaphore(self.service.slots)

    async def start(self) -> None:
        pass

    async def describe(self) -> list[RosterLine]:
        return [RosterLine(role="engine", rank=self._index, pid=os.getpid(), node=socket.gethostname())]

    async def generate(
        self, prompt: Prompt, num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        async with self._slots:
            version = self._version
            if self.service.generate_s:
                await asyncio.sleep(self.service.generate_s)
        make = columns if self.service.distinct else _known_columns
        answers = []
        for k, seed in enumerate(seeds):
            first = seed % 997 if self.service.distinct else 0
            tokens, mask, logprobs, versions = make(
                prompt.tokens, self.service.response_tokens, first, version
            )
            rollout = Rollout(
                uid=f"{prompt.uid}/{k}", prompt=prompt, tokens=tokens, action_mask=mask, logprobs=logprobs,
                text="", versions=versions, stop=StopReason.LENGTH,
            )  # fmt: skip
            answers.append(rollout)
        return answers

    async def join_weights(self, address: Address, rank_offset: int) -> None:
        pass

    async def receive_weights(self, version: int) -> list[WeightReceipt]:
        self._version = version
        return [receipt(version, f"engine {self._index} worker 0")]

    async def commit_weights(self, version: int) -> None:
        pass

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        return [-1.0] * (len(tokens) - 1)

    async def health(self) -> None:
        pass

    async def close(self) -> None:
        pass


class SimulatedLearner(Worker):
    """Actor and reference."""

    role = "actor"
    collective = False
    verbs: ClassVar[dict[str, Work]] = {
        "update_rows": Work.UPDATE,
        "score": Work.SCORE,
        "send_weights": Work.SEND,
        "logprobs": Work.PROBE,
    }
    service: ClassVar[Service] = Service()

    def start(self) -> None:
        pass

    def score(self, records: Any, micro_batches: Sequence[Sequence[int]]) -> Tensor:
        time.sleep(self.service.score_s)
        return -torch.ones(sum(len(rows) for rows in micro_batches), records.tokens.shape[1])

    def update_rows(
        self, records: Any, rows: NDArray, weights: NDArray, micro_batches: Sequence[Sequence[int]]
    ) -> Metrics:
        time.sleep(self.service.update_s)
        return {"loss": 0.0}

    def open_channel(
        self,
        transport: Transport,
        dtype: str,
        bucket_mb: int,
        world_size: int,
        timeout_s: float,
        adapter: ServedAdapter | None,
    ) -> Address:
        return address(world_size)

    def send_weights(self, version: int) -> WeightReceipt:
        return receipt(version, "actor rank 0")

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        return [-1.0] * (len(tokens) - 1)


class SimulatedJudge(Worker):
    role = "reward"
    collective = False
    verbs: ClassVar[dict[str, Work]] = {"score_groups": Work.REWARD}
    service: ClassVar[Service] = Service()

    def start(self) -> None:
        pass

    def score_groups(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, list[float]]:
        time.sleep(self.service.score_s)
        return {"simulated": [float(r.uid[-1] == "0") for group in groups for r in group]}


def serving(cls: Any, service: Service) -> Any:
    """The class with this service, also in another process."""
    return type(cls.__name__, (cls,), {"service": service})


def address(world_size: int) -> Address:
    """Where nobody sends anything."""
    return Address(
        transport="gloo", host="", port=0, world_size=world_size, dtype="float32", bucket_bytes=0,
        timeout_s=0, tensors=(),
    )  # fmt: skip


def receipt(version: int, who: str) -> WeightReceipt:
    return WeightReceipt(version=version, checksums={"weights": version}, who=who, num_bytes=0)


class Here:
    """Actor, reference and judge in this process, without groups: what is left is the loop alone."""

    def __init__(self) -> None:
        self._learner = SimulatedLearner()

    async def score(self, batch: Batch) -> Tensor:
        return -torch.ones_like(batch.rollout_logprobs)

    async def score_rollouts(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        return [-torch.ones(len(rollout.tokens)) for rollout in rollouts]

    async def distributions(self, batch: Batch) -> Tensor:
        raise NotImplementedError("no algorithm that reads distributions is measured here")

    async def update(self, minibatch: Minibatch) -> Metrics:
        return {"loss": 0.0}

    async def open_channel(self, num_receivers: int) -> Address:
        return address(1 + num_receivers)

    async def send_weights(self, version: int) -> WeightReceipt:
        return receipt(version, "actor rank 0")

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        return self._learner.logprobs(tokens)

    async def health(self) -> None:
        pass

    async def close(self) -> None:
        pass


class JudgeHere(Here):
    async def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:  # type: ignore[override]
        return [ScoredRollout(rollout=r, reward=float(r.uid[-1] == "0")) for r in rollouts]
