"""What the driver may ask of each role. It never learns which class answers.

A worker in one process and a group of Ray workers have the same verbs; here are the group's, awaited by
the driver. Every call has a deadline behind the handle, so an ``await`` ends with an answer or an error
that names role, rank and verb.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.batch import Batch, Minibatch, Prompt, Rollout, ScoredRollout

if TYPE_CHECKING:
    from torch import Tensor

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReceipt:
    """What one end of a weight sync saw. Two ends agree when version and every checksum are equal."""

    version: int
    checksums: dict[str, int]  # tensor name -> checksum of its bytes as they travelled
    who: str  # "actor rank 0", "engine 1 worker 0": for the message
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw a response. ``temperature`` 0 is greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int


class Role(Protocol):
    async def health(self) -> None: ...
    async def close(self) -> None: ...


class Residency(IntEnum):
    """How much of a role is on its devices."""

    ASLEEP = 0  # nothing: weights and all else wait in the memory of the host
    WEIGHTS = 1  # what a weight sync needs: no optimizer states, no KV cache
    AWAKE = 2


class Resident(Protocol):
    """A role that can leave its devices to others."""

    async def reside(self, level: Residency) -> None:
        """Returns when memory has been freed, or taken again. No other verb is under way."""
        ...


class Scorer(Role, Protocol):
    async def score(self, batch: Batch) -> Tensor:
        """[B, T] float32: log-probs (actor, reference) or values (critic); 0.0 off the action mask."""
        ...

    async def score_rollouts(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """The same of each rollout, [T]. Calls that wait for each other become one."""
        ...


class PolicyScorer(Scorer, Protocol):
    async def distributions(self, batch: Batch) -> Tensor:
        """[B, T, V] float32: log-probs of the whole vocabulary, of which ``score`` picks one; 0.0 off the
        action mask. 4 B T V bytes."""
        ...


class Learner(Scorer, Protocol):
    async def update(self, minibatch: Minibatch) -> Metrics:
        """Exactly one optimizer step over all ranks."""
        ...

    async def save(self, folder: Path, background: bool = False) -> None:
        """The training state as it is now; in ``background`` the answer comes once it is copied, and
        ``saved`` says when it is written. OSError: the disk is full."""
        ...

    async def saved(self, wait: bool = False) -> bool:
        """Whether the last save is written; raises what its writing raised."""
        ...

    async def load(self, folder: Path) -> None: ...
    async def export(self, folder: Path) -> None:
        """Writes a plain ``from_pretrained`` folder, tokenizer included."""
        ...


class Policy(Learner, PolicyScorer, Protocol):
    async def open_channel(self, num_receivers: int) -> Any:
        """Where so many receivers find the weights: for the engines to read, not for the driver."""
        ...

    async def send_weights(self, version: int) -> WeightReceipt: ...
    async def export_average(self, folder: Path) -> None:
        """As ``export``, of the moving average of the weights; only where rl.ema_decay keeps one."""
        ...

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """The log-prob of every token but the first, at temperature 1: for the probe after a sync."""
        ...


class Engine(Role, Protocol):
    async def generate(self, prompt: Prompt, num_samples: int, sampling: Sampling) -> list[Rollout]: ...
    async def prepare_weights(
        self, policy: Policy, version: int
    ) -> list[tuple[WeightReceipt, WeightReceipt]]:
        """The policy sends, all engines receive, and none of them serves yet. For each worker of each engine
        that has the new weights: what was sent and what arrived. An engine that fails is left out."""
        ...

    async def commit_weights(self, version: int) -> None:
        """The engines that have the new weights serve them."""
        ...

    async def logprobs(self, tokens: Sequence[int]) -> list[list[float]]:
        """For each engine that serves what ``Policy.logprobs`` says of the same tokens."""
        ...


class Reward(Role, Protocol):
    async def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The handles of one run. A role the algorithm does not need is None and was never started."""

    actor: Policy
    engine: Engine
    reward: Reward
    critic: Learner | None = None
    reference: PolicyScorer | None = None

    def learners(self) -> Iterator[tuple[str, Learner]]:
        yield "actor", self.actor
        if self.critic is not None:
            yield "critic", self.critic

    def all(self) -> Iterator[tuple[str, Role]]:
        for field in fields(self):
            if (role := getattr(self, field.name)) is not None:
                yield field.name, role
