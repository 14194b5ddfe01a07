"""The policy's tensors as vLLM's trainer engines want them: cast, checked, and summed up as they leave.

Imports vllm: for the GPU senders only.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from actors.weights.checksum import digest, resolve
from actors.weights.wire import TensorMeta, agreed, num_bytes
from orchestrator.roles import WeightReceipt


class Source(WeightSource):
    """``pairs`` is replaced before each send; vLLM iterates it once, on every rank."""

    def __init__(self, tensors: Sequence[TensorMeta], dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tuple(tensors), dtype
        self.pairs: Iterable[tuple[str, Tensor]] = ()
        self.digests: dict[str, Tensor] = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(meta.name, self.dtype, meta.shape) for meta in self.tensors]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.digests = {}
        for name, tensor in agreed(self.pairs, self.tensors):
            cast = tensor.detach().to(self.dtype).contiguous()
            self.digests[name] = digest(cast)
            yield name, cast

    def receipt(self, version: int, rank: int) -> WeightReceipt:
        return WeightReceipt(
            version=version,
            checksums=resolve(self.digests),
            who=f"actor rank {rank}",
            num_bytes=num_bytes(self.tensors, self.dtype),
        )


class Undriven:
    """vLLM's trainer engines drive the inference side through a client; here each engine drives itself, told
    by the driver at the same moment, so these calls do nothing."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
