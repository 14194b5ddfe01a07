"""Stacks sequences into records, and takes rows out of them. Padding is always on the right."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from struct import pack
from typing import Any, TypeVar

import torch
from torch import Tensor

from orchestrator.batch import Batch, Examples, Experience, ScoredRollout, StopReason
from orchestrator.examples import Unit

_CODES = {torch.int64: "q", torch.float32: "f", torch.bool: "?"}  # of struct

R = TypeVar("R", Batch, Experience, Examples)


def collate(scored: Sequence[ScoredRollout], *, pad_id: int) -> Batch:
    """Stacks rollouts in the order given; ``groups`` are numbered by first appearance of a prompt's uid."""
    rollouts = [s.rollout for s in scored]
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(r.prompt.uid, len(numbers)) for r in rollouts]
    tokens = pad([r.tokens for r in rollouts], pad_id, torch.int64)
    return Batch(
        tokens=tokens,
        attention_mask=attention([len(r.tokens) for r in rollouts], tokens.shape[1]),
        action_mask=pad([r.action_mask for r in rollouts], False, torch.bool),
        rollout_logprobs=pad([r.logprobs for r in rollouts], 0.0, torch.float32),
        rewards=torch.tensor([s.reward for s in scored], dtype=torch.float32),
        groups=torch.tensor(groups, dtype=torch.int64),
        versions=pad([r.versions for r in rollouts], 0, torch.int64),
        stopped=torch.tensor([r.stop is StopReason.EOS for r in rollouts], dtype=torch.bool),
        baselines=None if scored[0].baseline is None else torch.tensor([s.baseline for s in scored]),
    )


def collate_scores(scored: Sequence[ScoredRollout]) -> dict[str, Tensor]:
    """The scores that came with every rollout: {role: [B, T]}, 0.0 behind a sequence's end."""
    lengths = [len(s.rollout.tokens) for s in scored]
    return {
        name: _stack(torch.cat([s.scores[name] for s in scored]), lengths, 0.0) for name in scored[0].scores
    }


def collate_examples(units: Sequence[Unit], *, pad_id: int) -> Examples:
    """Stacks the rows of the units in the order given; ``groups`` number the units."""
    rows = [row for unit in units for row in unit.rows]
    tokens = pad([row for row, _ in rows], pad_id, torch.int64)
    targets = [target for unit in units for target in unit.targets or ()]
    return Examples(
        tokens=tokens,
        attention_mask=attention([len(row) for row, _ in rows], tokens.shape[1]),
        action_mask=pad([mask for _, mask in rows], False, torch.bool),
        groups=torch.tensor([number for number, unit in enumerate(units) for _ in unit.rows]),
        targets=torch.tensor(targets, dtype=torch.float32) if targets else None,
    )


def collate_packed(units: Sequence[Unit], *, pad_id: int) -> Examples:
    """Each unit's rows one after the other in one sequence; a padding token is a document of its own."""
    flat = [
        ([t for row, _ in unit.rows for t in row], [m for _, mask in unit.rows for m in mask])
        for unit in units
    ]
    examples = collate_examples([Unit(rows=((tuple(t), tuple(m)),)) for t, m in flat], pad_id=pad_id)
    positions = [[i for row, _ in unit.rows for i in range(len(row))] for unit in units]
    return replace(examples, positions=pad(positions, 0, torch.int64))


def pad(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
    """Rows of any length -> [B, T], filled on the right.

    Through ``struct``, which takes Python numbers 4 to 8 times as fast as ``array`` does.
    """
    flat = bytearray()
    for row in rows:
        flat += pack(f"{len(row)}{_CODES[dtype]}", *row)
    values = torch.frombuffer(flat, dtype=dtype) if flat else torch.empty(0, dtype=dtype)
    return _stack(values, [len(row) for row in rows], fill)


def _stack(values: Tensor, lengths: Sequence[int], fill: float) -> Tensor:
    """Rows one after the other -> [B, T]."""
    padded = torch.full((len(lengths), max(lengths)), fill, dtype=values.dtype)
    return padded.masked_scatter_(attention(lengths, max(lengths)), values)


def attention(lengths: Sequence[int], width: int) -> Tensor:
    """[B] lengths -> [B, T] bool, True on the first ``length`` columns."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def take(records: R, rows: Tensor | Iterable[int]) -> R:
    """The chosen rows, without the columns that only other rows needed."""
    index = rows if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=torch.int64)
    T = max(1, int(records.attention_mask[index].sum(1).max()))
    changed: dict[str, Any] = {}
    for field in fields(records):
        value = getattr(records, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value[index, :T] if value.dim() >= 2 else value[index]
    return replace(records, **changed)
