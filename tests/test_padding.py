"""Rows without their padding: the same answers and gradients as with it, from a kernel that takes lengths."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.model import LanguageModel, PolicyModel, ValueModel
from actors.padding import takes_lengths
from launch.trainable import check_trainable
from orchestrator.config import Model, Run
from tests import tiny

TOKENS = torch.tensor([[3, 9, 4, 12, 7, 2], [8, 1, 6, 0, 0, 0], [0, 0, 5, 11, 10, 13]])
KEPT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()


def varlen(_, query, key, value, mask, scaling=None, cu_seq_lens_q=None, **rest):
    """What FlashAttention computes: causal attention within each document, [1, heads, N, d] -> [1, N, ..]."""
    assert mask is None and query.shape[0] == 1
    assert rest["max_length_q"] == int(cu_seq_lens_q.diff().max())
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
        )
        for a, b in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def alone(_, query, key, value, mask, scaling=None, **rest):
    """One that looks neither at lengths nor at positions."""
    return varlen(
        _, query, key, value, mask, scaling, torch.tensor([0, query.shape[2]]), max_length_q=query.shape[2]
    )


def with_kernel(
    kind: type[LanguageModel], folder: Model, kernel: object, monkeypatch: pytest.MonkeyPatch
) -> LanguageModel:
    """As a model with flash attention is loaded: its kernel comes last."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", kernel)
    model = kind.load(folder.model_copy(update={"attention": "eager"}), head_seed=0)
    model.model.config._attn_implementation_internal = "flash_attention_2"
    return model


def answers(model: torch.nn.Module, positions: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Log-probs or values, and the gradients of their weighted sum."""
    asked = KEPT & (KEPT.cumsum(1) > 1)  # nothing is known before a row's first token
    if isinstance(model, PolicyModel):
        found = model(TOKENS, KEPT, asked, 1.0, False, False, positions)[0]
    else:
        found = model(TOKENS, KEPT, asked)
    (found * torch.arange(found.numel()).view_as(found)).sum().backward()
    return found.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [PolicyModel, ValueModel])
def test_one_row_answers_as_padded_rows_do(
    tmp_path: Path, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Model(path=tiny.save(tmp_path, tiny.llama()), dtype="float32")
    expected, gradients = answers(kind.load(folder, head_seed=0))

    def kernel(*args, cu_seq_lens_q=None, **rest):
        if cu_seq_lens_q is None:  # the proof's second document, which lies alone
            return alone(*args, **rest)
        seen.append(int(cu_seq_lens_q[-1]))
        return varlen(*args, cu_seq_lens_q=cu_seq_lens_q, **rest)

    seen: list[int] = []
    found, own = answers(with_kernel(kind, folder, kernel, monkeypatch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for mine, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
    assert set(seen) == {7, int(KEPT.sum())}  # the proof's tokens, then what is not padding


def test_packed_documents_stay_apart_in_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that hold two documents each, as sft.packing makes them."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]])
    kept = torch.ones_like(KEPT)
    folder = Model(path=tiny.save(tmp_path, tiny.llama()), dtype="float32")
    expected = PolicyModel.load(folder)(TOKENS, kept, kept, 1.0, False, False, positions)[0]

    def kernel(*args, cu_seq_lens_q=None, **rest):
        if cu_seq_lens_q is None:
            return alone(*args, **rest)
        return varlen(*args, cu_seq_lens_q=cu_seq_lens_q, **rest)

    policy = with_kernel(PolicyModel, folder, kernel, monkeypatch)
    found = policy(TOKENS, kept, kept, 1.0, False, False, positions)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_kernel_that_mixes_documents_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Model(path=tiny.save(tmp_path, tiny.llama()), dtype="float32")
    policy = with_kernel(PolicyModel, folder, alone, monkeypatch)
    with pytest.raises(RuntimeError, match=r"use model\.attention=sdpa"):
        answers(policy)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_computes_no_padding_and_keeps_documents_apart(tmp_path: Path) -> None:
    """The real kernel, compiled; PyTorch has no backward pass of it for CPUs."""
    folder = Model(path=tiny.save(tmp_path, tiny.llama()), dtype="float32")
    policy = PolicyModel.load(folder.model_copy(update={"attention": "flex_attention"}))
    seen: list[int] = []
    policy.model.base_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    packed = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]])
    for kept, positions in ((KEPT, None), (torch.ones_like(KEPT), packed)):
        asked = kept & (kept.cumsum(1) > 1)
        expected = PolicyModel.load(folder)(TOKENS, kept, asked, 1.0, False, False, positions)[0]
        found = policy(TOKENS, kept, asked, 1.0, False, False, positions)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert seen == [7, 4, 13, 18]  # the proof; what is not padding; all


def test_layers_with_a_state_keep_their_rows() -> None:
    class Holds:
        def __init__(self, kind: str, attention: str) -> None:
            self.config = LlamaConfig()
            self.config.layer_types = ["full_attention", kind]
            self.config._attn_implementation_internal = attention

    assert takes_lengths(Holds("sliding_attention", "flash_attention_2"))
    assert takes_lengths(Holds("full_attention", "flex_attention"))
    assert not takes_lengths(Holds("linear_attention", "flash_attention_2"))
    assert not takes_lengths(Holds("mamba", "flash_attention_2"))
    assert not takes_lengths(Holds("sliding_attention", "sdpa"))


@pytest.mark.parametrize(
    ("model", "gpus", "said"),
    [
        ({"attention": "flash_attention_2"}, 0, r"runs on GPUs only; set roles\.actor\.gpus, or use sdpa"),
        ({"attention": "flash_attention_2"}, 1, r"needs flash-attn, which is not installed here"),
        ({"attention": "flex_attention"}, 0, r"runs on GPUs only; set roles\.actor\.gpus, or use sdpa"),
        ({"liger": True}, 0, r"model\.liger=true runs on GPUs only; .* or use false"),
        ({"liger": True}, 1, r"needs liger-kernel, which is not installed here"),
    ],
)
def test_kernels_that_cannot_run_here_are_refused(model: dict, gpus: int, said: str) -> None:
    run = Run(model={"path": "x", **model}, sft={}, roles={"actor": {"gpus": gpus}})
    with pytest.raises(ValueError, match=said):
        check_trainable(run)


def test_ligers_kernels_go_into_the_layers_after_the_head_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger itself runs on GPUs only: here only what it is asked for."""
    asked: list[tuple[str, dict[str, bool]]] = []
    monkeypatch.setattr(
        "actors.model.apply_liger_kernel", lambda model, config: asked.append((type(model).__name__, config))
    )
    folder = Model(path=tiny.save(tmp_path, tiny.llama()), dtype="float32", liger=True)
    PolicyModel.load(folder)
    ValueModel.load(folder)
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert asked == [("LlamaForCausalLM", losses), ("LlamaForSequenceClassification", losses)]
