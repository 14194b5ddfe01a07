"""Engines on the actor's own GPUs: vLLM's CUDA IPC transfer. Memory handles travel, weights stay.

Every rank of the actor packs full tensors into a buffer on its GPU, and each vLLM worker opens the buffer on
its own. The handles go from the actor's rank 0 to the workers through a mailbox, a TCPStore on this machine
(IPC does not leave it):

    sender   put "7/0" (version 7, bucket 0)  wait for "7/0/done/1", "7/0/done/2", ...  refill, put "7/1" ...
    worker   wait for "7/0"  load  put "7/0/done/<rank>"  wait for "7/1" ... until "end"

So the sender waits for the slowest worker before it reuses the buffer. The letters are pickles, as vLLM's own
are: the store listens on the loopback interface only.
"""

import datetime
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import TCPStore
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCTrainerInitInfo,
    IPCTrainerWeightTransferEngine,
    IPCWeightTransferEngine,
    IPCWeightTransferInitInfo,
    IPCWeightTransferUpdateInfo,
)

from actors.weights.receivers import TappedReceiver
from actors.weights.source import Source, Undriven
from actors.weights.wire import Address, Sending, TensorMeta, Transport, num_bytes
from orchestrator.roles import WeightReceipt

_LOOPBACK = "127.0.0.1"


class Outbox(Undriven):
    """vLLM's trainer engine calls ``update_weights`` per bucket; that is the letter, and returning means it
    was read."""

    def __init__(self, store: TCPStore, num_workers: int) -> None:
        self._store, self._num_workers = store, num_workers
        self.version, self._bucket = 0, 0

    def start_weight_update(self) -> None:
        self._bucket = 0

    def update_weights(self, update_info: Any) -> None:
        key = f"{self.version}/{self._bucket}"
        self._store.set(key, pickle.dumps(update_info))
        readers = [f"{key}/done/{rank}" for rank in range(1, self._num_workers + 1)]
        self._store.wait(readers)
        for old in [key, *readers]:
            self._store.delete_key(old)
        self._bucket += 1

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._store.set(f"{self.version}/{self._bucket}", b"end")


def letters(store: TCPStore, version: int, rank: int) -> Iterator[dict[str, Any]]:
    """Each letter of an update; asking for the next says that this one's buffer may be reused."""
    bucket = 0
    while (letter := store.get(f"{version}/{bucket}")) != b"end":
        yield pickle.loads(letter)
        store.set(f"{version}/{bucket}/done/{rank}", b"1")
        bucket += 1


class IpcSender(Sending):
    """See ``wire.Sender``. All ranks of the actor send: each serves the worker on its GPU."""

    transport: ClassVar[Transport] = "ipc"
    _engine: IPCTrainerWeightTransferEngine | None = None

    def open(self, tensors: Sequence[TensorMeta], *, world_size: int) -> Address:
        self.close()
        timeout = datetime.timedelta(seconds=self._timeout_s)
        self._host = _LOOPBACK
        self._source = Source(tensors, self._dtype)
        store = None
        if self._rank == 0:
            store = TCPStore(_LOOPBACK, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        self._outbox = Outbox(store, world_size - 1) if store else Undriven()
        largest = max(num_bytes([meta], self._dtype) for meta in tensors)  # vLLM does not split a tensor
        init = IPCTrainerInitInfo(
            rank=self._rank, packed=True, packed_buffer_size_bytes=max(self._bucket_bytes, largest)
        )
        self._engine = IPCTrainerWeightTransferEngine.trainer_init(
            init, client=self._outbox, source=self._source
        )
        return self._address_of(tensors, world_size, store.port if store else 0)

    @torch.no_grad()
    def send(self, named: Iterable[tuple[str, Tensor]], version: int) -> WeightReceipt:
        if self._engine is None:
            raise RuntimeError("send() before open(): the engines do not know this sender")
        self._source.pairs = named
        if isinstance(self._outbox, Outbox):
            self._outbox.version = version
        self._engine.send_weights()
        return self._source.receipt(version, self._rank)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None


class IpcReceiver(TappedReceiver, IPCWeightTransferEngine):
    """vLLM's own receiver, fed from the mailbox."""

    def join(self) -> None:
        at = self.address
        timeout = datetime.timedelta(seconds=at.timeout_s)
        self._store = TCPStore(at.host, at.port, is_master=False, timeout=timeout, wait_for_workers=False)
        IPCWeightTransferEngine.init_transfer_engine(self, IPCWeightTransferInitInfo(packed=True))

    def arrive(self, version: int) -> int:
        """A letter is filed under the version that was sent; for another one there is none, and the wait
        ends."""
        for letter in letters(self._store, version, self.rank()):
            IPCWeightTransferEngine.receive_weights(self, IPCWeightTransferUpdateInfo(**letter))
            torch.accelerator.synchronize()  # the copy out of the shared buffer has happened
        return version

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._packed_importer.close()

    def shutdown(self) -> None:
        IPCWeightTransferEngine.shutdown(self)
        self._store = None
