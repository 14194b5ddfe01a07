"""The short loop of the supervised stages: they step on shuffled units, epoch after epoch.

    units -> collate -> [reference scores -> KL of mismatched rows] -> one optimizer step

What an objective does not need is not asked for: without ``reference`` no worker of one exists.
"""

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from orchestrator.batch import Examples, Minibatch
from orchestrator.collate import collate_examples, collate_packed
from orchestrator.examples import Unit
from orchestrator.ledger import sample_seed
from orchestrator.objectives._base import Objective
from orchestrator.roles import Metrics

SCORED_AT_ONCE = 64  # units per forward call outside training


class SupervisedScorer(Protocol):
    async def score(self, batch: Examples) -> Tensor:
        """[B, T] log-probs of the action tokens (policy, reference) or [B] scores (reward model)."""
        ...


class SupervisedLearner(SupervisedScorer, Protocol):
    async def update(self, minibatch: Minibatch) -> Metrics: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Summed log-probs of responses under one model."""

    rows: Tensor  # [B]
    mismatched: Tensor | None  # [B] of the mismatched rows; None: the objective has none


class ReferenceScores(Protocol):
    async def of(self, numbers: Sequence[int], rows: Examples, mismatched: Examples | None) -> Scores: ...


def num_steps(num_units: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of a stage; raises ValueError when one batch is more than the data."""
    if batch_size > num_units:
        raise ValueError(f"batch_size={batch_size} is more than the {num_units} rows of the data; lower it")
    return max(1, int(num_units * epochs) // batch_size)


def unit_order(num_units: int, seed: int) -> Iterator[int]:
    """Endless epochs, each shuffled on its own."""
    epoch = 0
    while True:
        order = list(range(num_units))
        random.Random(sample_seed(seed, f"order/{epoch}")).shuffle(order)
        yield from order
        epoch += 1


async def fit(  # noqa: PLR0913 - a stage, by name
    learner: SupervisedLearner,
    units: Sequence[Unit],
    *,
    objective: Objective,
    reference: ReferenceScores | None = None,
    packed: bool = False,
    batch_size: int,
    steps: int,
    seed: int,
    pad_id: int,
    log: Callable[[int, Examples, Metrics], None],
    start: int = 0,
    stepped: Callable[[int], Awaitable[None]] | None = None,
) -> None:
    """Optimizer steps ``start + 1`` to ``steps`` of ``batch_size`` units; the learner holds the weights of
    ``start``. ``stepped`` is awaited after each of them."""
    order = islice(unit_order(len(units), seed), start * batch_size, None)
    for step in range(start + 1, steps + 1):
        numbers = [next(order) for _ in range(batch_size)]
        drawn = [units[number] for number in numbers]
        examples = (collate_packed if packed else collate_examples)(drawn, pad_id=pad_id)
        if reference is not None:
            examples = await with_reference(learner, reference, numbers, drawn, examples, pad_id=pad_id)
        weights = objective.weights(examples)
        rows = torch.arange(len(examples.tokens))
        metrics = await learner.update(Minibatch(records=examples, rows=rows, weights=weights))
        if objective.needs_kl:
            metrics = {**metrics, "kl": examples.kl}
        log(step, examples, objective.summarize(metrics))
        if stepped is not None:
            await stepped(step)


async def with_reference(
    learner: SupervisedScorer,
    reference: ReferenceScores,
    numbers: Sequence[int],
    units: Sequence[Unit],
    examples: Examples,
    *,
    pad_id: int,
) -> Examples:
    """The examples with the reference's log-probs, and the KL where the units have mismatched rows."""
    mismatched = mismatched_rows(units, pad_id=pad_id)
    scores = await reference.of(numbers, examples, mismatched)
    kl = 0.0
    if mismatched is not None and scores.mismatched is not None:
        policy = response_sums(await learner.score(mismatched), mismatched)
        kl = max(0.0, float((policy - scores.mismatched).mean()))  # arXiv:2402.01306 section 4.1
    return replace(examples, ref_logprobs=scores.rows, kl=kl)


def mismatched_rows(units: Sequence[Unit], *, pad_id: int) -> Examples | None:
    rows = [Unit(rows=(unit.mismatched,)) for unit in units if unit.mismatched is not None]
    return collate_examples(rows, pad_id=pad_id) if rows else None


def response_sums(logprobs: Tensor, examples: Examples) -> Tensor:
    """[B, T] -> [B] over the response."""
    return logprobs.where(examples.action_mask, 0.0).sum(1)


class LiveReference:
    """Asks the reference at every step."""

    def __init__(self, scorer: SupervisedScorer) -> None:
        self._scorer = scorer

    async def of(self, numbers: Sequence[int], rows: Examples, mismatched: Examples | None) -> Scores:
        others = None
        if mismatched is not None:
            others = response_sums(await self._scorer.score(mismatched), mismatched)
        return Scores(rows=response_sums(await self._scorer.score(rows), rows), mismatched=others)


class KnownReference:
    """Remembers what the reference said of every unit; the reference itself may be gone."""

    def __init__(self, known: Sequence[Scores]) -> None:
        self._known = known  # one of each unit

    @classmethod
    async def ask(cls, scorer: SupervisedScorer, units: Sequence[Unit], *, pad_id: int) -> "KnownReference":
        """One pass over all units, those of similar length together."""
        live, known = LiveReference(scorer), {}
        order = sorted(range(len(units)), key=lambda number: units[number].num_tokens)
        for start in range(0, len(order), SCORED_AT_ONCE):
            numbers = order[start : start + SCORED_AT_ONCE]
            drawn = [units[number] for number in numbers]
            others = mismatched_rows(drawn, pad_id=pad_id)
            scores = await live.of(numbers, collate_examples(drawn, pad_id=pad_id), others)
            sizes = [len(unit.rows) for unit in drawn]
            mine = [None] * len(drawn) if scores.mismatched is None else torch.split(scores.mismatched, 1)
            for number, rows, other in zip(numbers, torch.split(scores.rows, sizes), mine, strict=True):
                known[number] = Scores(rows=rows, mismatched=other)
        return cls([known[number] for number in range(len(units))])

    async def of(self, numbers: Sequence[int], rows: Examples, mismatched: Examples | None) -> Scores:
        found = [self._known[number] for number in numbers]
        others = [score.mismatched for score in found if score.mismatched is not None]
        return Scores(
            rows=torch.cat([score.rows for score in found]), mismatched=torch.cat(others) if others else None
        )
