"""Cuts an experience into optimizer steps and says what each token weighs in them.

A learner's loss is ``(weights * token_loss).sum()`` over every rank and micro-batch. The weights of a
minibatch sum to 1 over the whole minibatch, so the result cannot depend on how many ranks or micro-batches
it was cut into (BUGS C1, C2, C4).
"""

from collections.abc import Iterator
from typing import assert_never

import torch
from torch import Tensor

from orchestrator.batch import Experience, Minibatch
from orchestrator.config import Updates
from orchestrator.settings import Aggregate


def minibatches(
    experience: Experience, updates: Updates, *, aggregate: Aggregate, constant_length: int, seed: int
) -> Iterator[Minibatch]:
    """``epochs`` passes in ``minibatches`` equal steps each, shuffled by ``seed``; groups stay whole.

    Raises ValueError when the sequences, or the groups, do not divide evenly: a shorter last step would weigh
    its sequences more than the others.
    """
    groups = None if experience.groups is None else _rows_of_groups(experience.groups)
    B, count = len(experience.tokens) if groups is None else len(groups), updates.minibatches
    if B % count:
        what = "sequences" if groups is None else "groups"
        raise ValueError(f"{B} {what} do not split into {count} equal minibatches; pick a divisor of {B}")
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(updates.epochs):
        order = torch.arange(B) if count == 1 else torch.randperm(B, generator=shuffle)
        for drawn in order.view(count, B // count):
            rows = drawn if groups is None else torch.cat([groups[number] for number in drawn.tolist()])
            mask = experience.action_mask[rows]
            yield Minibatch(
                records=experience, rows=rows, weights=token_weights(mask, aggregate, constant_length)
            )


def _rows_of_groups(groups: Tensor) -> list[Tensor]:
    """The rows of each group; those of -1 are in none. Example: [1, -1, 0, 1] gives [2], [0, 3]."""
    order = groups.argsort(stable=True)[int((groups < 0).sum()) :]
    sizes = groups[order].bincount()
    return list(torch.split(order, sizes[sizes > 0].tolist()))


def token_weights(mask: Tensor, aggregate: Aggregate, constant_length: int = 0) -> Tensor:
    """[B, T] bool -> [B, T] float32, by one of three rules. Sequences with no token count nowhere.

    token_mean: every token weighs the same (DAPO, arXiv:2503.14476 section 3.3).
    sequence_mean: every sequence weighs the same, split over its tokens (GRPO, arXiv:2402.03300 eq. 3).
    constant_length: 1 / (sequences x constant_length) (Dr. GRPO, arXiv:2503.20783); the one rule whose
    weights do not sum to 1, because its divisor is the length allowed and not the length used.
    """
    ones = mask.float()
    lengths = ones.sum(1, keepdim=True)
    num_sequences = (lengths > 0).sum().clamp(min=1)
    match aggregate:
        case "token_mean":
            return ones / ones.sum().clamp(min=1)
        case "sequence_mean":
            return ones / lengths.clamp(min=1) / num_sequences
        case "constant_length":
            return ones / constant_length / num_sequences
        case _:
            assert_never(aggregate)
