"""Attention of bfloat16 models on CPUs against float64 by the definition: rounded once, at the end."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import actors.model
from actors.attention import sdpa

BATCH, HEADS, GROUPS, LENGTH, SIZE = 2, 6, 3, 70, 16
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
SPARSE = CAUSAL & ((torch.arange(LENGTH) % 7 != 3) | torch.eye(LENGTH, dtype=torch.bool))
MASKS = {
    "none": None,
    "bool": SPARSE[None, None],
    "added": torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bfloat16).masked_fill(~SPARSE, float("-inf")),
}


def by_definition(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """[B, heads, T, d] float64 each -> [B, T, heads, d]: softmax(q k / sqrt(d)) v over what is ``seen``."""
    key, value = (x.repeat_interleave(GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / SIZE**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, value)


@pytest.mark.parametrize("mask", MASKS)
def test_answer_and_gradients_are_rounded_once(mask: str) -> None:
    torch.manual_seed(0)
    heads = HEADS, HEADS // GROUPS, HEADS // GROUPS
    given = [torch.randn(BATCH, n, LENGTH, SIZE, dtype=torch.bfloat16).requires_grad_() for n in heads]
    wide = [x.detach().double().requires_grad_() for x in given]
    slope = torch.randn(BATCH, LENGTH, HEADS, SIZE, dtype=torch.bfloat16)
    module = SimpleNamespace(num_key_value_groups=GROUPS, is_causal=True)

    answer, _ = sdpa(module, *given, MASKS[mask], scaling=SIZE**-0.5)  # type: ignore[arg-type]
    expected = by_definition(*wide, CAUSAL if mask == "none" else SPARSE)
    found = answer, *torch.autograd.grad(answer, given, slope)
    right = expected, *torch.autograd.grad(expected, wide, slope.double())
    for ours, theirs in zip(found, right, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours == theirs.bfloat16()).double().mean() > 0.995  # PyTorch's own: 0.4 to 0.8


def test_models_of_this_process_attend_by_it() -> None:
    assert actors.model and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
