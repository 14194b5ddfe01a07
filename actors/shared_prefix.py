"""Every token of a micro-batch once: no padding, and nothing that a row begins with as the one before it.

    rows   P P P c c .      tokens     P P P c c r r r
           P P P r r r      positions  0 1 2 3 4 3 4 5

A token's state depends on what stands before it alone, so rows that begin alike (the samples of one prompt,
the two of a pair) have the same states there. What looks at each token by itself, nearly all of a model, is
given the tokens; attention alone is given the rows (attention.py), and answers as it does without this.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Operations over 4 d that take as long as laying out a token in its row and back, in each layer: as measured
# on CPUs; and by the bandwidth and the operations of an H200, not measured.
SPREAD, SPREAD_ON_GPU = 60, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """[S] tokens instead of [B, T]."""

    tokens: Tensor  # [1, S] int64
    positions: Tensor  # [1, S] of each token in its row
    places: Tensor  # [B, T] int64: which of the S stands there, 0 at padding
    own: Tensor  # [S] where in B x T it stands first
    again: Tensor  # where in B x T one stands that stood before

    def given(self) -> dict[str, Any]:
        """Arguments of the backbone. With a mask of four dimensions Transformers makes none of its own."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.tokens.device)
        return {
            "input_ids": self.tokens, "attention_mask": mask, "position_ids": self.positions, "folded": self,
        }  # fmt: skip

    def spread(self, x: Tensor) -> Tensor:
        """[S, ...] -> [B, T, ...]"""
        return _Spread.apply(x, self).unflatten(0, self.places.shape)

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [S, ...]"""
        return _Gather.apply(x.flatten(0, 1), self)


class _Spread(torch.autograd.Function):
    """PyTorch's own gradient adds row by row, which on a CPU takes longer than attention; here only what
    stands in several rows is added, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, folded: Folded) -> Tensor:
        ctx.folded = folded
        return x.index_select(0, folded.places.flatten())

    @staticmethod
    def backward(ctx: Any, by_rows: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        own, again = ctx.folded.own, ctx.folded.again
        total = by_rows.index_select(0, own).float()
        total.index_add_(0, ctx.folded.places.flatten()[again], by_rows.index_select(0, again).float())
        return total.to(by_rows.dtype), None


class _Gather(torch.autograd.Function):
    """Of equals the first; the others have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, folded: Folded) -> Tensor:
        ctx.folded, ctx.rows = folded, len(x)
        return x.index_select(0, folded.own)

    @staticmethod
    def backward(ctx: Any, by_tokens: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        blank = by_tokens.new_zeros(ctx.rows, *by_tokens.shape[1:])
        return blank.index_copy_(0, ctx.folded.own, by_tokens), None


def takes_rows(model: PreTrainedModel) -> bool:
    """Whether every layer attends through attention.py to all that stands before, and remembers nothing; what
    of that shows before a forward pass."""
    config = model.config.get_text_config()
    passes_on = any(p.kind is p.VAR_KEYWORD for p in signature(model.base_model.forward).parameters.values())
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    windows = getattr(config, "sliding_window", None) is not None or getattr(config, "alibi", False)
    return (
        config._attn_implementation == "sdpa"
        and passes_on
        and not (windows or model._is_stateful)
        and set(layers) == {"full_attention"}
    )


def fold(tokens: Tensor, attention_mask: Tensor) -> Folded | None:
    """Of rows [B, T]; None where padding is not on the right."""
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        return None
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    alike = torch.zeros_like(attention_mask)
    alike[1:] = (tokens[1:] == tokens[:-1]) & attention_mask[1:] & attention_mask[:-1]
    shared = alike.long().cumprod(1).sum(1, keepdim=True)  # [B, 1] tokens that the row before has, too
    owner = rows.where(columns >= shared, 0).cummax(0).values  # [B, T] the first of the rows with this token
    first = (owner == rows) & attention_mask
    numbered = (first.flatten().cumsum(0) - 1).view_as(tokens)
    return Folded(
        tokens=tokens[first][None],
        positions=columns[first][None],
        places=numbered.gather(0, owner).where(attention_mask, 0),
        own=first.flatten().nonzero().squeeze(1),
        again=(attention_mask & ~first).flatten().nonzero().squeeze(1),
    )


def saves(folded: Folded, model: PreTrainedModel) -> bool:
    """More time than it costs: a layer's matrices do 6 d operations a token, counted as ``SPREAD``."""
    matrices = 6 * model.config.get_text_config().hidden_size
    spread = SPREAD_ON_GPU if folded.tokens.is_cuda else SPREAD
    rows = folded.places.numel()
    return len(folded.own) * matrices + rows * spread < rows * matrices
