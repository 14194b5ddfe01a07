"""The CPU transport: a gloo group of its own, so that neither the trainer's nor vLLM's default group is
touched.

Both ends are here and neither imports vllm; ``receivers.py`` puts ``receive`` into vLLM. A header with the
version goes first, so an engine reports the version that was sent, not the one it expected. While a bucket
travels the sender sums it up and flattens the next, and the receiver loads the one before.
"""

import datetime
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore, Work

from actors.weights.checksum import digest, resolve
from actors.weights.wire import Address, Bucket, Sending, TensorMeta, Transport, agreed, num_bytes, plan
from orchestrator.roles import WeightReceipt


def join(store: TCPStore, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """Blocks until all ranks have come, or raises after the timeout."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timeout)


def connect(host: str, port: int, timeout_s: float) -> TCPStore:
    timeout = datetime.timedelta(seconds=timeout_s)
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def broadcast(group: ProcessGroupGloo, tensor: Tensor) -> Work:
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


def receive(
    group: ProcessGroupGloo, buckets: Sequence[Bucket], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, in memory of its own bucket: vLLM keeps some until their layer is complete."""
    travelling = [_request(group, buckets[0])]
    for index, bucket in enumerate(buckets):
        flat, work = travelling.pop()
        work.wait()
        if index + 1 < len(buckets):
            travelling.append(_request(group, buckets[index + 1]))
        for slot in bucket:
            yield slot.meta.name, slot.view(flat, dtype)


def receive_version(group: ProcessGroupGloo) -> int:
    header = torch.empty(1, dtype=torch.int64)
    broadcast(group, header).wait()
    return int(header)


def _request(group: ProcessGroupGloo, bucket: Bucket) -> tuple[Tensor, Work]:
    flat = torch.empty(bucket[-1].stop, dtype=torch.uint8)
    return flat, broadcast(group, flat)


# One bucket is cast and summed up while the one before travels and the one before that is loaded, so small
# ones keep three places busy; 64 MiB at a time took twice as long, in new pages for every bucket besides.
PIPELINED_BYTES = 4 << 20


class GlooSender(Sending):
    """See ``wire.Sender``. Ranks other than 0 only iterate, so that ZeRO-3's gathers find all ranks."""

    transport: ClassVar[Transport] = "gloo"
    _address: Address | None = None
    _store: TCPStore | None = None
    _group: ProcessGroupGloo | None = None
    _buckets: Sequence[Bucket] = ()

    def open(self, tensors: Sequence[TensorMeta], *, world_size: int) -> Address:
        self.close()
        self._bucket_bytes = min(self._bucket_bytes, PIPELINED_BYTES)
        port = 0
        if self._rank == 0:
            timeout = datetime.timedelta(seconds=self._timeout_s)
            self._store = TCPStore(self._host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
            port = self._store.port
        self._buckets = plan(tensors, self._dtype, self._bucket_bytes)
        self._address = self._address_of(tensors, world_size, port)
        return self._address

    @torch.no_grad()
    def send(self, named: Iterable[tuple[str, Tensor]], version: int) -> WeightReceipt:
        if self._address is None:
            raise RuntimeError("send() before open(): the engines do not know this sender")
        pairs = agreed(named, self._address.tensors)
        try:
            checksums = {name: 0 for name, _ in pairs} if self._rank else self._broadcast(pairs, version)
        except RuntimeError:  # a receiver is gone
            self._let_go(pairs)
            raise
        return WeightReceipt(
            version=version,
            checksums=checksums,
            who=f"actor rank {self._rank}",
            num_bytes=num_bytes(self._address.tensors, self._dtype),
        )

    def _broadcast(self, pairs: Iterator[tuple[str, Tensor]], version: int) -> dict[str, int]:
        group = self._joined()
        broadcast(group, torch.tensor([version])).wait()
        largest = max(bucket[-1].stop for bucket in self._buckets)
        buffers = [torch.zeros(largest, dtype=torch.uint8) for _ in range(2)]  # one travels, one is filled
        digests: dict[str, Tensor] = {}
        travelling: Work | None = None
        for index, bucket in enumerate(self._buckets):
            flat = buffers[index % 2][: bucket[-1].stop]
            for slot in bucket:
                slot.view(flat, self._dtype).copy_(next(pairs)[1])
            if travelling is not None:
                travelling.wait()
            travelling = broadcast(group, flat)
            digests |= {slot.meta.name: digest(slot.view(flat, self._dtype)) for slot in bucket}
        if travelling is not None:
            travelling.wait()
        next(pairs, None)  # lets `agreed` see that nothing is left over
        return resolve(digests)

    def _let_go(self, pairs: Iterator[tuple[str, Tensor]]) -> None:
        """The other receivers learn at once that nothing comes any more; the other ranks of the actor, which
        gather tensor by tensor with this one, reach their end."""
        self.close()
        for _ in pairs:
            pass

    def _joined(self) -> ProcessGroupGloo:
        if self._group is None:
            assert self._store is not None and self._address is not None
            self._group = join(self._store, 0, self._address.world_size, self._timeout_s)
        return self._group

    def refuse(self) -> None:
        """Receivers of a channel that is new come to it only when they receive; to a closed one they would
        try to come for all of their time."""
        if self._store is not None:
            with suppress(RuntimeError):  # one never came
                self._joined()
        self.close()

    def close(self) -> None:
        """Who still waits for this end learns of it."""
        if self._group is not None:
            self._group.abort()
        self._group = self._store = self._address = None
