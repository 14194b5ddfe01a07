"""What a backbone is given of rows of unequal length, and its hidden states in rows again.

rows      [B, T], padding computed and thrown away; length-grouped micro-batches keep it small
one row   [1, N], the attended tokens of all rows behind one another, for attention that is told where each
          document ends (FlashAttention's varlen; flex attention, whose mask Transformers makes from positions
          that begin anew): nothing is computed for padding
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

# Rows [B, T] and what of them is kept -> one row for the backbone, and its states [1, N, d] in rows again.
Row = Callable[[Tensor, Tensor], tuple[dict[str, Any], Callable[[Tensor], Tensor]]]


def takes_lengths(model: PreTrainedModel) -> bool:
    """FlashAttention or flex attention in all layers; a state-space or linear-attention layer would carry its
    state from one document into the next."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    plain = all("attention" in kind and "linear" not in kind for kind in kinds)
    return plain and str(config._attn_implementation).startswith(("flash", "flex"))


def rows(tokens: Tensor, attention_mask: Tensor, positions: Tensor | None) -> dict[str, Any]:
    """Arguments of the backbone. Positions count attended tokens, whichever side the padding is on (BUGS A1).

    Padding on the right needs no mask: no token looks to its right, so attention stays plainly causal.
    ``positions`` that restart within a row are packed documents: Transformers masks them from one another
    (masking_utils.find_packed_sequence_indices), but only when it is given no mask.
    """
    mask = None
    if positions is None:
        if bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        else:
            mask, positions = attention_mask, counted(attention_mask)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


def one_row(tokens: Tensor, kept: Tensor, positions: Tensor | None) -> dict[str, Any]:
    """The same for the tokens of ``kept``, [B, T] bool, as one row; a document begins at each position 0."""
    position = (counted(kept) if positions is None else positions.expand_as(tokens))[kept]  # [N]
    starts = (position == 0).nonzero().squeeze(1)
    ends = torch.cat([starts, starts.new_tensor([len(position)])]).to(torch.int32)  # [documents + 1]
    longest = int(position.max()) + 1
    return {
        "input_ids": tokens[kept][None], "attention_mask": None, "position_ids": position[None],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


@torch.no_grad()
def keeps_apart(run: Callable[[dict[str, Any]], Tensor], row: Row, device: torch.device) -> bool:
    """False when a document sees the one before it: not every architecture passes on to its attention where
    documents end. ``run``: arguments of the backbone -> its hidden states."""
    tokens = torch.tensor([[1, 2, 3, 0], [1, 4, 5, 6]], device=device)
    kept = torch.tensor([[True, True, True, False], [True] * 4], device=device)
    given, in_rows_again = row(tokens, kept)
    behind = in_rows_again(run(given))[1]
    alone = run(rows(tokens[1:], kept[1:], None))[0]
    return bool((behind - alone).norm() <= 0.1 * alone.norm())  # bfloat16 alone makes 0.01


def in_rows(states: Tensor, kept: Tensor) -> Tensor:
    """[1, N, d] -> [B, T, d], zeros where there was padding."""
    blank = states.new_zeros(kept.numel(), states.shape[-1])
    return blank.index_copy(0, kept.flatten().nonzero().squeeze(1), states[0]).view(*kept.shape, -1)


def counted(attention_mask: Tensor) -> Tensor:
    """[B, T] position of each attended token in its row."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
