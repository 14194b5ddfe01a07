"""Rows that begin alike are computed once: the responses to one prompt as one sequence.

    chosen    P P P c c        one row    P P P c c r r r
    rejected  P P P r r r      positions  0 1 2 3 4 3 4 5        r sees P and r, never c

A token's state depends on what stands before it alone, so every row gets the states it would have had.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """[N, S] instead of [B, T]: a row for each run of rows that belong together."""

    tokens: Tensor  # [N, S] int64, 0 where nothing stands
    positions: Tensor  # [N, S] of each token in the row it came from
    mask: Tensor  # [N, 1, S, S] bool: who sees whom
    places: Tensor  # [B, T] int64: where in N x S the token of each row is

    def given(self) -> dict[str, Any]:
        """Arguments of the backbone."""
        return {"input_ids": self.tokens, "attention_mask": self.mask, "position_ids": self.positions}

    def unfold(self, states: Tensor) -> Tensor:
        """[N, S, d] -> [B, T, d]."""
        return states.flatten(0, 1).index_select(0, self.places.flatten()).view(*self.places.shape, -1)


def takes_masks(model: PreTrainedModel) -> bool:
    """Whether every layer attends as a mask says, and to nothing by distance or memory of its own."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    windows = getattr(config, "sliding_window", None) is not None or getattr(config, "alibi", False)
    return (
        config._attn_implementation == "sdpa"
        and not (windows or model._is_stateful)
        and set(layers) == {"full_attention"}
    )


def fold(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor, groups: Tensor) -> Folded | None:
    """Of rows [B, T], padded on the right, of equal ``groups`` [B] side by side, what they begin with as the
    first of them does is taken once. None where that costs more than it saves, or the model cannot."""
    (B, T), device = tokens.shape, tokens.device
    if not takes_masks(model) or bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        return None
    rows, columns = torch.arange(B, device=device), torch.arange(T, device=device)
    leads = torch.ones_like(groups, dtype=torch.bool)
    leads[1:] = groups[1:] != groups[:-1]
    row = leads.cumsum(0) - 1  # [B] of the folded ones
    first = rows[leads][row]
    lengths = attention_mask.sum(1)
    alike = (tokens == tokens[first]) & attention_mask & attention_mask[first]
    shared = alike.long().cumprod(1).sum(1).where(~leads, 0)  # [B] tokens that the first row has, too
    own = lengths - shared
    ends = own.cumsum(0)
    begin = ends - own - (ends - own)[first]  # [B] where in its folded row the own tokens of a row begin
    S = int((begin + own).max())
    N = int(row[-1]) + 1
    # Operations of a layer over 4 d a token: 6 d in its matrices, and the keys that it attends to. Kernels
    # skip the half behind the diagonal only where they are given no mask.
    matrices = 6 * model.config.get_text_config().hidden_size
    if N * S * (matrices + S) >= B * T * (matrices + T / 2):
        return None
    inside = columns >= shared[:, None]
    places = row[:, None] * S + columns + (begin - shared)[:, None].where(inside, 0)
    stands = inside & attention_mask
    places = places.where(attention_mask, row[:, None] * S)

    def spread(values: Tensor, blank: int) -> Tensor:
        folded = values.new_full((N * S,), blank)
        folded[places[stands]] = values.expand(B, T)[stands]
        return folded.view(N, S)

    owner, sees = spread(rows[:, None], -1), spread(shared[:, None], 0)
    slots = torch.arange(S, device=device)
    lead = first[leads][:, None, None]
    theirs = owner[:, None, :]
    mask = (theirs == owner[:, :, None]) | ((theirs == lead) & (slots < sees[:, :, None]))
    mask &= slots <= slots[:, None]
    return Folded(
        tokens=spread(tokens, 0), positions=spread(columns[None], 0), mask=mask[:, None], places=places
    )
