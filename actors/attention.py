"""Attention as ``attention: sdpa`` computes it: of rows whose tokens are kept once each (shared_prefix.py),
and of bfloat16 models on CPUs in float32.

PyTorch's bfloat16 kernel for CPUs rounds the attention weights to bfloat16, and its backward pass is slow
where rows are short: 60 ms a layer against 28 ms in float32 at 16 rows of 144 tokens (9 heads of 64, one
thread of an EPYC with AVX512-BF16), and *more* with two threads, 85 ms against 18 ms. From about 1,000 tokens
a row it is the faster one, by a quarter; the rounding stays.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from actors.shared_prefix import Folded


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    folded: Folded | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As Transformers' own under this name: [B, heads, T, d] each -> [B, T, heads, d] in ``query``'s type.
    With ``folded`` [1, heads, S, d] each -> [1, S, heads, d]."""
    given = query, key, value
    if folded is not None:
        rows = (folded.spread(x[0].transpose(0, 1)).transpose(1, 2) for x in given)
        return folded.gather(sdpa(module, *rows, None, **options)[0])[None], None
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return sdpa_attention_forward(module, *given, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    answer, _ = sdpa_attention_forward(module, *(x.float() for x in given), attention_mask, **options)
    return answer.to(query.dtype), None
