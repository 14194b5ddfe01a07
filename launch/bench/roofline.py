"""What a machine cannot beat: the bytes and operations that a phase needs, over what the machine was measured
to move and to compute.

    decode    every step reads all weights and the keys and values of the sequences in it (bandwidth)
    train     2 operations a weight and token forward, 4 backward, and attention (compute)
    sync      every byte of a weight read once and written once (copy)

The counts are those of a decoder with grouped-query attention and a gated MLP (Llama, Qwen2, Mistral).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

CEILING_S = 0.3  # for which each ceiling is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model: Shape(hidden=576, inner=1536, layers=30, query=576, key=192, vocab=49152)."""

    hidden: int
    inner: int
    layers: int
    query: int  # heads x head size
    key: int  # key-value heads x head size
    vocab: int

    @staticmethod
    def of(config: PretrainedConfig) -> Shape:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Shape(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            layers=config.num_hidden_layers,
            query=config.num_attention_heads * head,
            key=config.num_key_value_heads * head,
            vocab=config.vocab_size,
        )

    @property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with: of the layers and of the head."""
        attention = self.hidden * (self.query + 2 * self.key) + self.query * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.hidden * self.vocab

    def forward_flops(self, length: int) -> float:
        """A token of a sequence of this length, causal attention at half its square."""
        return 2.0 * self.multiplied + 2.0 * self.layers * self.query * length

    def train_flops(self, length: int) -> float:
        """Forward and backward, nothing computed twice."""
        return 3.0 * self.forward_flops(length)

    def decode_bytes(self, *, batch: int, context: int, item: int) -> float:
        """Of one step of ``batch`` sequences with ``context`` cached tokens each, ``item`` bytes a number."""
        cached = 2 * self.layers * self.key * item
        return float(item * self.multiplied + batch * (context + 1) * cached)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Measured on this machine, with as many threads as the role has."""

    flops: float  # of a large matrix product
    bytes_per_s: float  # of a large copy, counting bytes read and written

    def decode_tokens_per_s(self, shape: Shape, *, batch: int, context: int, item: int) -> float:
        memory = shape.decode_bytes(batch=batch, context=context, item=item) / self.bytes_per_s
        compute = batch * (2 * shape.multiplied + 4 * shape.layers * shape.query * context) / self.flops
        return batch / max(memory, compute)


def ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """About a second."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty((1 << 31) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        flops=2 * size**3 / _best(lambda: a @ b, device),
        bytes_per_s=2 * source.numel() / _best(lambda: target.copy_(source), device),
    )


def _best(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    action()
    best, until = float("inf"), time.perf_counter() + CEILING_S
    while time.perf_counter() < until or best == float("inf"):
        _wait(device)
        start = time.perf_counter()
        action()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
