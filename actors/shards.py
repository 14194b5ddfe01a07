"""The float32 weights that this rank's optimizer steps, at every ZeRO stage, and the way back to whole
tensors.

    stage 0      each parameter whole, on every rank
    stage 1, 2   the parameters of a group side by side in one flat tensor, of which rank r has the r-th part:
                 most parameters lie inside one rank's part, a few across a border
    stage 3      each parameter cut over all ranks; a rank has its pieces side by side in one flat tensor

What must see whole matrices (Muon) or whole weights (the export of an average) asks here and needs not know
the stage. Reads the attributes of DeepSpeed 0.19's ZeRO optimizers; ``tests/test_optimizers.py`` puts every
stage together again.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Which part of one parameter this rank has; empty slices when it has none."""

    parameter: torch.nn.Parameter
    shape: torch.Size  # of the whole parameter
    here: slice  # in the flat tensor of this rank
    there: slice  # in the whole parameter, flattened
    alone: bool  # one rank has the whole parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One tensor of the optimizer and the parameters it holds pieces of."""

    owned: Tensor  # float32; what the optimizer steps
    pieces: tuple[Piece, ...]
    replicated: bool  # stage 0: every rank has the same

    def whole(self, like: Tensor, piece: Piece, *, everywhere: bool) -> Tensor | None:
        """A parameter's whole tensor out of ``like``, which is laid out as ``owned``.

        Collective unless the parameter is ``alone``; None on a rank that has nothing of it, unless
        ``everywhere``. Ranks add up pieces in a field of zeros, which is exact.
        """
        if self.replicated:
            return like.view(piece.shape)
        absent = piece.here.start == piece.here.stop
        if piece.alone and absent and not everywhere:
            return None
        field = torch.zeros(piece.shape.numel(), dtype=like.dtype, device=like.device)
        field[piece.there] = like[piece.here]
        if dist.get_world_size() > 1 and (everywhere or not piece.alone):
            dist.all_reduce(field)
        return field.view(piece.shape)


def shards_of(stage: int, optimizer: Any) -> list[Shard]:
    """``optimizer`` is the engine's: ZeRO's, or the plain one at stage 0."""
    if stage == 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return [_replicated(p) for p in parameters]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if stage == 3:
        flats, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
        return [
            Shard(owned=flat, pieces=_cut_each(group, rank, world_size), replicated=False)
            for flat, group in zip(flats, groups, strict=True)
        ]
    return [
        Shard(owned=flat, pieces=_cut_row(group, offsets, rank, flat.numel()), replicated=False)
        for flat, group, offsets in zip(
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            strict=True,
        )
    ]


def _replicated(parameter: torch.nn.Parameter) -> Shard:
    every = slice(0, parameter.numel())
    piece = Piece(parameter=parameter, shape=parameter.shape, here=every, there=every, alone=True)
    return Shard(owned=parameter, pieces=(piece,), replicated=True)


def _cut_row(
    parameters: list[torch.nn.Parameter], offsets: list[int], rank: int, size: int
) -> tuple[Piece, ...]:
    """Stages 1 and 2: of the row of parameters, rank r has the elements r * size to (r + 1) * size."""
    begin, end = rank * size, (rank + 1) * size
    pieces = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        last = offset + parameter.numel()
        low = min(max(offset, begin), end)
        high = max(low, min(last, end))
        pieces.append(
            Piece(
                parameter=parameter,
                shape=parameter.shape,
                here=slice(low - begin, high - begin),
                there=slice(low - offset, high - offset) if high > low else slice(0, 0),
                alone=offset // size == (last - 1) // size,
            )
        )
    return tuple(pieces)


def _cut_each(parameters: list[Any], rank: int, world_size: int) -> tuple[Piece, ...]:
    """Stage 3: of each parameter, rank r has the r-th of equal parts; the last ones may be short or empty."""
    pieces, offset = [], 0
    for parameter in parameters:
        part, numel = parameter.partition_numel(), parameter.ds_numel
        low, high = min(rank * part, numel), min((rank + 1) * part, numel)
        pieces.append(
            Piece(
                parameter=parameter,
                shape=parameter.ds_shape,
                here=slice(offset, offset + high - low),
                there=slice(low, high),
                alone=world_size == 1,
            )
        )
        offset += part
    return tuple(pieces)
