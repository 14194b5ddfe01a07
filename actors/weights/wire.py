"""What both ends of a weight transfer agree on: the address, the tensors, and how they lie in buckets.

Buckets are planned on each side from the same address, so no metadata travels with an update. Each tensor
starts at a multiple of 16 bytes, so that it can be viewed in its own type where it arrived.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from orchestrator.roles import WeightReceipt

Transport = Literal["gloo", "nccl", "ipc"]
_ALIGN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """One tensor of the policy, e.g. TensorMeta(name="model.norm.weight", shape=(128,))."""

    name: str
    shape: tuple[int, ...]


def metas(named: Iterable[tuple[str, Tensor]]) -> tuple[TensorMeta, ...]:
    """Of plain tensors; a ZeRO-3 shard's full shape is its ``ds_shape``, which the caller knows."""
    return tuple(TensorMeta(name=name, shape=tuple(tensor.shape)) for name, tensor in named)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """What an engine needs to know of A and B to serve them as LoRA."""

    rank: int
    alpha: float
    layers: tuple[str, ...]  # ends of the names of the layers that may have one, e.g. ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """How weights travel: what a sender is opened with, every time."""

    transport: Transport
    dtype: str  # the engine's: tensors are cast before they travel
    bucket_mb: int
    adapter: ServedAdapter | None = None  # is all that travels


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the sender waits and what it will send; everything an engine needs to join."""

    transport: Transport
    host: str
    port: int
    world_size: int  # the sender and every vLLM worker of every engine
    dtype: str  # "float32": cast on the sending side
    bucket_bytes: int
    timeout_s: float
    tensors: tuple[TensorMeta, ...]
    adapter: ServedAdapter | None = None  # None: the tensors are the model's; else A and B, in PEFT's names

    def plain(self, rank_offset: int) -> dict[str, Any]:
        """As vLLM ships it to its workers; worker k of the engine has rank ``rank_offset + k``."""
        fields = asdict(self) | {"rank_offset": rank_offset}
        del fields["transport"], fields["tensors"]
        return fields | {
            "names": [meta.name for meta in self.tensors],
            "shapes": [list(meta.shape) for meta in self.tensors],
        }


class Sender(Protocol):
    """The actor's end, one object in each of its ranks; only rank 0's address and receipt count."""

    def open(self, tensors: Sequence[TensorMeta], *, world_size: int) -> Address:
        """Waits for nobody. Called again, it replaces the group."""
        ...

    def send(self, named: Iterable[tuple[str, Tensor]], version: int) -> WeightReceipt:
        """The tensors of ``open`` in the same order, cast to the engine's dtype. ValueError for any other."""
        ...

    def refuse(self) -> None:
        """Nothing comes: who waits for it, or is on its way, learns of it. Then as ``close``."""
        ...

    def close(self) -> None: ...


class Sending:
    """What the senders of all transports share."""

    transport: ClassVar[Transport]

    def __init__(
        self, *, rank: int, host: str, dtype: torch.dtype, bucket_mb: int, timeout_s: float = 60
    ) -> None:
        self._rank, self._host, self._dtype, self._timeout_s = rank, host, dtype, timeout_s
        self._bucket_bytes = bucket_mb << 20

    def refuse(self) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError

    def _address_of(self, tensors: Sequence[TensorMeta], world_size: int, port: int) -> Address:
        return Address(
            transport=self.transport,
            host=self._host,
            port=port,
            world_size=world_size,
            dtype=str(self._dtype).removeprefix("torch."),
            bucket_bytes=self._bucket_bytes,
            timeout_s=self._timeout_s,
            tensors=tuple(tensors),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A tensor's place in its bucket."""

    meta: TensorMeta
    start: int  # bytes
    stop: int

    def view(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        return flat[self.start : self.stop].view(dtype).view(self.meta.shape)


Bucket = tuple[Slot, ...]


def plan(tensors: Sequence[TensorMeta], dtype: torch.dtype, bucket_bytes: int) -> list[Bucket]:
    """Fills buckets in order; a tensor larger than a bucket travels alone."""
    buckets: list[list[Slot]] = [[]]
    end = 0
    for meta in tensors:
        size = math.prod(meta.shape) * dtype.itemsize
        start = -(-end // _ALIGN) * _ALIGN
        if buckets[-1] and start + size > bucket_bytes:
            buckets.append([])
            start = 0
        end = start + size
        buckets[-1].append(Slot(meta=meta, start=start, stop=end))
    return [tuple(bucket) for bucket in buckets if bucket]


def num_bytes(tensors: Sequence[TensorMeta], dtype: torch.dtype) -> int:
    return sum(math.prod(meta.shape) for meta in tensors) * dtype.itemsize


def agreed(
    named: Iterable[tuple[str, Tensor]], tensors: Sequence[TensorMeta]
) -> Iterator[tuple[str, Tensor]]:
    """The same pairs, each checked against what the engines were told; ValueError names the first
    difference."""
    arriving = iter(named)
    for meta in tensors:
        name, tensor = next(arriving, ("nothing", None))
        shape = None if tensor is None else tuple(tensor.shape)
        if tensor is None or (name, shape) != (meta.name, meta.shape):
            raise ValueError(
                f"send() got {name} {shape}; open() announced {meta.name} {meta.shape}; open again"
            )
        yield name, tensor
    if (extra := next(arriving, None)) is not None:
        raise ValueError(
            f"send() got {extra[0]} after the {len(tensors)} tensors open() announced; open again"
        )
