"""The actor's end of a transport, by name. The GPU senders import vllm, so each is imported only where it is
used."""

from importlib import import_module

import torch

from actors.weights.wire import Sender, Transport
from actors.worker import own_address

SENDERS = {
    "gloo": "actors.weights.gloo:GlooSender",
    "nccl": "actors.weights.nccl:NcclSender",
    "ipc": "actors.weights.ipc:IpcSender",
}


def open_sender(
    transport: Transport, *, rank: int, dtype: torch.dtype, bucket_mb: int, timeout_s: float
) -> Sender:
    """``dtype`` is the engine's: tensors are cast before they travel."""
    module, _, name = SENDERS[transport].partition(":")
    make = getattr(import_module(module), name)
    return make(rank=rank, host=own_address(), dtype=dtype, bucket_mb=bucket_mb, timeout_s=timeout_s)
