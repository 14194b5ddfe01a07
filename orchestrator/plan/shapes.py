"""How large a model is, from its config.json: parameters, KV bytes, operations. Llama's anatomy and its
relatives: gated MLP, grouped heads, optional biases, experts.

Letters, here and in ``memory.py`` and ``service.py``: h hidden, f intermediate, q and kv the widths of all
query and key heads, L layers, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

KNOWN = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)  # counted to the last weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a causal language model; with ``scalar`` its head is one score instead of the vocabulary."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: int = 0  # 0: one MLP a layer
    active_experts: int = 0
    scalar: bool = False
    exact: bool = True  # False: a relative of Llama whose extra weights are not counted

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def head_params(self) -> int:
        return self.hidden if self.scalar else self.hidden * self.vocab

    def layer_params(self, experts: int) -> int:
        """Of one layer with so many of its experts."""
        h, f, q, kv = self.hidden, self.intermediate, self.q, self.kv
        attention = h * (q + 2 * kv) + q * h + self.qkv_bias * (q + 2 * kv) + self.output_bias * h
        attention += self.qk_norm * 2 * self.head_dim
        mlp = 3 * h * f + self.mlp_bias * (2 * f + h)
        return attention + 2 * h + (mlp if not self.experts else experts * mlp + h * self.experts)

    @property
    def params(self) -> int:
        """All weights, each shared one once."""
        head = 0 if self.tied and not self.scalar else self.head_params
        return self.vocab * self.hidden + self.layers * self.layer_params(self.experts) + self.hidden + head

    @property
    def active_params(self) -> int:
        """Weights that one token is multiplied with: not the embedding, and of the experts only its own."""
        return self.layers * self.layer_params(self.active_experts) + self.head_params

    def kv_bytes(self, dtype: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv * dtype

    def forward_flops(self, tokens: float, context: float) -> float:
        """Of so many tokens that each see ``context`` others: 2 per weight, 4 q per layer and pair
        (arXiv:2001.08361 table 1)."""
        return tokens * (2 * self.active_params + 4 * self.layers * self.q * context)

    def with_score(self) -> Shape:
        """The same backbone with a scalar head: critic and reward model."""
        return replace(self, scalar=True)


def _llama(h: int, f: int, layers: int, heads: int, kv: int, vocab: int) -> Shape:
    return Shape(
        hidden=h, intermediate=f, layers=layers, heads=heads, kv_heads=kv, head_dim=h // heads, vocab=vocab,
        tied=False, max_positions=131072,
    )  # fmt: skip


def _qwen(h: int, f: int, layers: int, heads: int, kv: int, tied: bool) -> Shape:
    shape = _llama(h, f, layers, heads, kv, 151936 if tied else 152064)
    return replace(shape, tied=tied, qkv_bias=True, max_positions=32768)


NAMED = {
    "smollm2-135m": replace(_llama(576, 1536, 30, 9, 3, 49152), tied=True, max_positions=8192),
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2, True),
    "qwen2.5-3b": _qwen(2048, 11008, 36, 16, 2, True),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4, False),
    "qwen2.5-14b": _qwen(5120, 13824, 48, 40, 8, False),
    "qwen2.5-32b": _qwen(5120, 27648, 64, 40, 8, False),
    "qwen2.5-72b": _qwen(8192, 29568, 80, 64, 8, False),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256),
}


def named_shape(path: str) -> Shape | None:
    """Of "Qwen/Qwen2.5-7B-Instruct" or "qwen2.5-7b": nothing is downloaded for these. None: not among
    them."""
    last = path.rsplit("/", maxsplit=1)[-1].lower()
    for suffix in ("-instruct", "-base", "-hf"):
        last = last.removesuffix(suffix)
    return NAMED.get(last.replace("meta-llama", "llama"))


def read_shape(file: Path, *, field: str) -> Shape:
    """Of a config.json; ValueError when it is missing, no JSON or of another anatomy."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{field}: {file} cannot be read ({error}); give a model folder, a Hub id, or one of the known "
            f"shapes: {', '.join(NAMED)}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{field}: {file} holds no object; give the config.json of a model")
    return shape_of(config.get("text_config", config), where=f"{field}: {file}")


def shape_of(config: Mapping[str, Any], *, where: str) -> Shape:
    """ValueError names the field that is missing or impossible."""
    kind = str(config.get("model_type", "unknown"))

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{where}: {name}={value!r} of model_type={kind!r}; the planner needs a whole number of at "
                f"least 1: it knows Llama's anatomy ({', '.join(KNOWN)})"
            )
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}; the "
            "configuration is damaged"
        )
    moe = config.get("num_experts", config.get("num_local_experts")) is not None
    experts = size("num_experts", config.get("num_local_experts")) if moe else 0
    return Shape(
        hidden=hidden,
        intermediate=size(
            "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
        ),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", hidden // heads),
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=size("max_position_embeddings", 2**31),
        qkv_bias=bool(config.get("attention_bias", kind == "qwen2")),
        output_bias=bool(config.get("attention_bias", False)) and kind != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        experts=experts,
        active_experts=size("num_experts_per_tok") if moe else 0,
        exact=kind in KNOWN,
    )


def check_parallel(shape: Shape, tensor_parallel: int) -> None:
    """ValueError when heads do not divide: vLLM splits query heads evenly, and key heads unless it copies
    them."""
    if shape.heads % tensor_parallel:
        divisors = [n for n in (1, 2, 4, 8, 16) if shape.heads % n == 0]
        raise ValueError(
            f"engine.tensor_parallel={tensor_parallel} does not divide the {shape.heads} attention heads; "
            f"use one of {', '.join(map(str, divisors))}"
        )
    if shape.kv_heads % tensor_parallel and tensor_parallel % shape.kv_heads:
        raise ValueError(
            f"engine.tensor_parallel={tensor_parallel} and the {shape.kv_heads} key heads do not divide one "
            "another; use a divisor or a multiple of the key heads"
        )
