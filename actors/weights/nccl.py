"""Engines on GPUs of their own: vLLM's NCCL weight transfer, both ends, with checksums taken on the device.

vLLM packs the tensors into buckets and broadcasts them from the actor's rank 0; the other ranks of the actor
only iterate. NCCL has no time limit of its own: when a side never comes, the driver's deadline ends the call
and the process must go.
"""

import socket
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from actors.weights.receivers import TappedReceiver
from actors.weights.source import Source, Undriven
from actors.weights.wire import Address, Sending, TensorMeta, Transport
from orchestrator.roles import WeightReceipt


class NcclSender(Sending):
    """See ``wire.Sender``. The current CUDA device must be the rank's."""

    transport: ClassVar[Transport] = "nccl"
    _engine: NCCLTrainerWeightTransferEngine | None = None

    def open(self, tensors: Sequence[TensorMeta], *, world_size: int) -> Address:
        self.close()
        self._source = Source(tensors, self._dtype)
        self._opened = self._address_of(tensors, world_size, _free_port(self._host))
        return self._opened

    @torch.no_grad()
    def send(self, named: Iterable[tuple[str, Tensor]], version: int) -> WeightReceipt:
        self._source.pairs = named
        if self._engine is None:  # blocks until every worker has come, hence not in open()
            self._engine = self._join()
        self._engine.send_weights()
        return self._source.receipt(version, self._rank)

    def _join(self) -> NCCLTrainerWeightTransferEngine:
        at = self._opened
        init = NCCLTrainerInitInfo(
            rank=self._rank,
            master_address=at.host,
            master_port=at.port,
            world_size=at.world_size,
            packed=True,
            packed_buffer_size_bytes=at.bucket_bytes,
        )
        return NCCLTrainerWeightTransferEngine.trainer_init(init, client=Undriven(), source=self._source)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None


class NcclReceiver(TappedReceiver, NCCLWeightTransferEngine):
    """vLLM's own receiver between our addresses and our tap."""

    def join(self) -> None:
        at = self.address
        init = NCCLWeightTransferInitInfo(
            master_address=at.host,
            master_port=at.port,
            rank_offset=at.rank_offset,
            world_size=at.world_size,
            packed=True,
            packed_buffer_size_bytes=at.bucket_bytes,
        )
        NCCLWeightTransferEngine.init_transfer_engine(self, init)

    def arrive(self, version: int) -> int:
        """The stream carries no version: it is the one that both ends were asked for in the same breath."""
        at = self.address
        update = NCCLWeightTransferUpdateInfo(
            names=at.names, dtype_names=[at.dtype] * len(at.names), shapes=at.shapes
        )
        NCCLWeightTransferEngine.receive_weights(self, update)
        return version

    def shutdown(self) -> None:
        NCCLWeightTransferEngine.shutdown(self)


def _free_port(host: str) -> int:
    """vLLM binds it again at the first send; another process could take it in between, and the send then says
    so."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
