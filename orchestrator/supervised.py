"""The short loop of the supervised stages: SFT and reward models step on shuffled rows, epoch after epoch."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from orchestrator.batch import Examples, Minibatch
from orchestrator.collate import collate_examples
from orchestrator.ledger import sample_seed
from orchestrator.roles import Metrics

Row = tuple[Sequence[int], Sequence[bool]]  # tokens, action_mask


class SupervisedLearner(Protocol):
    async def update(self, minibatch: Minibatch) -> Metrics: ...


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
    units: Sequence[Sequence[Row]],
    *,
    weights: Callable[[Examples], Tensor],
    batch_size: int,
    steps: int,
    seed: int,
    pad_id: int,
    log: Callable[[int, Examples, Metrics], None],
) -> None:
    """``steps`` optimizer steps of ``batch_size`` units; a unit is one row (SFT) or a pair of rows."""
    order = unit_order(len(units), seed)
    for step in range(1, steps + 1):
        rows = [row for _ in range(batch_size) for row in units[next(order)]]
        examples = collate_examples(rows, pad_id=pad_id)
        minibatch = Minibatch(records=examples, rows=torch.arange(len(rows)), weights=weights(examples))
        log(step, examples, await learner.update(minibatch))
