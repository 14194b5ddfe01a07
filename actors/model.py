"""Hugging Face models seen as RLHF sees them: log-probs, values and scores of the tokens they are shown.

This is the only file that shifts tokens by one. A causal model's hidden state at t-1 speaks about the token
at t; everything that leaves this file is already at t, and 0.0 where nothing was asked.

Each wrapper keeps the Hugging Face model whole under ``.model`` and only replaces its last layer by one that
answers the question (a token's log-prob, a scalar), with the same parameter names: the folder it saves is a
plain ``from_pretrained`` folder. The answer is computed inside a module's own ``forward`` because that is
where ZeRO-3 gathers the layer's parameters.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from actors.attention import sdpa
from actors.heads import ScalarHead, TokenHead
from actors.padding import Row, in_rows, keeps_apart, one_row, rows, takes_lengths
from actors.shared_prefix import fold, saves, takes_rows
from actors.virtual_tokens import VirtualTokens
from orchestrator.config import Model

# (log-probs [B, T], their entropy [B, T]; 0.0 where not known) -> the loss by each of them, both [B, T].
RowSlopes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
AttentionInterface.register("sdpa", sdpa)  # in the place of Transformers' own, in all models of this process
_LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # log-probs are ours (vocabulary.py)


class LanguageModel(nn.Module):
    """What the trained and the frozen wrappers share: a backbone run with positions of our own."""

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.model = model
        self.virtual: VirtualTokens | None = None  # of prefix, prompt and P-tuning
        self._apart: bool | None = None  # whether rows behind one another do not see each other
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for layer in (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)):
                layer.training = True  # they look at their own mode, and a loaded model is in eval mode

    def hidden_states(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """[B, T] -> [B, T, d]. ``positions`` that restart within a row are packed documents. Without them,
        what neighbouring rows begin with alike is computed once, and padding never, where that saves time
        (shared_prefix.py)."""
        kept = attention_mask.bool()
        if self.virtual is None and takes_lengths(self.model):
            if not self._keeps_apart(_behind, tokens.device):
                raise RuntimeError(
                    "this architecture does not keep documents of one row apart under model.attention="
                    f"{self.model.config._attn_implementation}; use model.attention=sdpa"
                )
            if positions is not None or not kept.all():
                return in_rows(self._run(one_row(tokens, kept, positions)), kept)
        elif self.virtual is None and takes_rows(self.model) and self._keeps_apart(_folded, tokens.device):
            folded = fold(tokens, kept) if positions is None else None
            if folded is not None and saves(folded, self.model):
                return folded.spread(self._run(folded.given())[0])
        given = rows(tokens, attention_mask, positions)
        if self.virtual is not None:
            given = self.virtual.inputs(self.model, tokens, given["attention_mask"], given["position_ids"])
        states = self._run(given)
        return states[:, states.shape[1] - tokens.shape[1] :]

    def _keeps_apart(self, row: Row, device: torch.device) -> bool:
        """Asked at the first look, whatever it is at: the proof's forward passes are collectives of all ranks
        under ZeRO-3."""
        if self._apart is None:
            self._apart = keeps_apart(self._run, row, device)
        return self._apart

    def _run(self, given: dict[str, Any]) -> Tensor:
        return self.model.base_model(**given, use_cache=False, return_dict=True).last_hidden_state

    def write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """A plain ``from_pretrained`` folder with the weights given (the live ones may be sharded)."""
        quantized = hasattr(self.model, "hf_quantizer")
        if quantized:  # the weights given are whole: the folder must not say that they are not
            del self.model.hf_quantizer, self.model.config.quantization_config
            self.model.is_quantized = False
        self.model.save_pretrained(folder, state_dict=weights)

    @classmethod
    @abstractmethod
    def load(cls, source: Model, *, head_seed: int | None = None) -> "LanguageModel":
        """Reads a folder or Hub id; ``head_seed`` seeds a head that the folder does not have."""


class PolicyModel(LanguageModel):
    """A causal language model that says how likely given tokens are."""

    def forward(  # noqa: PLR0913, PLR0917 - DeepSpeed's engine takes plain tensors, by place
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        temperature: float,
        entropy: bool = False,
        distribution: bool = False,
        positions: Tensor | None = None,
        slopes: RowSlopes | None = None,
    ) -> tuple[Tensor | None, ...]:
        """log p(tokens[b, t] | tokens[b, :t]) and the entropy there, [B, T] float32, 0.0 off ``mask``; and
        the log-probs of the whole vocabulary, [B, T, V] float32: 4 B T V bytes, not split into blocks. With
        ``slopes`` a fourth: the carrier of the gradient, or None where the others have it.

        The vocabulary is computed for the positions of the mask only. The first token has nothing before it:
        0.0. Plain tensors, not a record: DeepSpeed looks for tensors in tuples to hang its hooks on.
        """
        states = self.hidden_states(tokens, attention_mask, positions)
        return self.answer(states, tokens, mask, temperature, entropy, distribution, slopes)

    def answer(  # noqa: PLR0913, PLR0917 - as ``forward``
        self,
        states: Tensor,
        tokens: Tensor,
        mask: Tensor,
        temperature: float,
        entropy: bool,
        distribution: bool,
        slopes: RowSlopes | None = None,
    ) -> tuple[Tensor | None, ...]:
        """As ``forward``, of hidden states [B, T, d]."""
        asked = mask.clone()
        asked[:, 0] = False
        at = asked.flatten().nonzero().squeeze(1)
        states = states.flatten(0, 1).index_select(0, at - 1)
        head = self.model.get_output_embeddings()

        def placed(x: Tensor, at: Tensor) -> Tensor:
            blank = states.new_zeros(tokens.numel(), *x.shape[1:], dtype=torch.float32)
            return blank.index_copy(0, at, x).view(*tokens.shape, *x.shape[1:])

        def of_block(logprobs: Tensor, entropies: Tensor, block: slice) -> tuple[Tensor, Tensor]:
            assert slopes is not None
            here = at[block]
            by_logprobs, by_entropy = slopes(placed(logprobs, here), placed(entropies, here))
            return by_logprobs.flatten()[here], by_entropy.flatten()[here]

        of_blocks = None if slopes is None else of_block
        found = head(states, tokens.flatten()[at], temperature, entropy, distribution, of_blocks)
        return *(None if x is None else placed(x, at) for x in found[:3]), *found[3:]

    @classmethod
    def load(cls, source: Model, *, head_seed: int | None = None) -> "PolicyModel":
        """ValueError for a model whose logits are not those of its ``lm_head`` (see ``_check_head``)."""
        on_gpus = source.attention.startswith(("flash", "flex"))  # only there, and the model is not yet
        options = _options(source) | ({"attn_implementation": "eager"} if on_gpus else {})
        model, report = AutoModelForCausalLM.from_pretrained(
            source.path, config=_config(source), output_loading_info=True, **options
        )
        _refuse_missing(source, report["missing_keys"])
        # A model in 4 bits comes on its GPU, others on the CPU.
        probe = torch.arange(1, 6, device=model.device)[None] % model.config.get_text_config().vocab_size
        with torch.no_grad():
            expected = F.log_softmax(model(input_ids=probe, use_cache=False).logits.float(), dim=-1)
        model.set_output_embeddings(TokenHead(model.get_output_embeddings(), model.config.get_text_config()))
        policy = cls(model, source.gradient_checkpointing)
        _check_head(policy, probe, expected)
        if on_gpus:
            model.set_attn_implementation(source.attention)
        if source.liger:
            apply_liger_kernel(model, _LIGER)
        return policy


class ValueModel(LanguageModel):
    """A backbone with one scalar per token: the critic. A head missing in the folder starts at zero."""

    def forward(self, tokens: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """Value of the state BEFORE each token, [B, T] float32, 0.0 where ``mask`` is False (BUGS A3)."""
        return values_before(self.model.score, self.hidden_states(tokens, attention_mask), mask)

    @classmethod
    def load(cls, source: Model, *, head_seed: int | None = None) -> "ValueModel":
        return cls(_load_scalar(source, head_seed), source.gradient_checkpointing)


class ScoreModel(LanguageModel):
    """A backbone with one scalar per sequence: the reward model."""

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Score at the last attended token, [B] float32, wherever the padding is (BUGS A5)."""
        states = self.hidden_states(tokens, attention_mask)
        return self.model.score(last_states(states, attention_mask))

    @classmethod
    def load(cls, source: Model, *, head_seed: int | None = None) -> "ScoreModel":
        return cls(_load_scalar(source, head_seed), source.gradient_checkpointing)


def _behind(tokens: Tensor, kept: Tensor) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    return one_row(tokens, kept, None), lambda states: in_rows(states, kept)


def _folded(tokens: Tensor, kept: Tensor) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    folded = fold(tokens, kept)
    assert folded is not None  # padded on the right
    return folded.given(), lambda states: folded.spread(states[0])


def values_before(head: nn.Module, states: Tensor, mask: Tensor) -> Tensor:
    """States [B, T, d] -> what the head says of the state BEFORE each token, [B, T], 0.0 off ``mask``."""
    before = F.pad(head(states)[:, :-1], (1, 0))
    return torch.where(mask, before, 0.0)  # not a product: NaN x 0 is NaN (BUGS C5)


def last_states(states: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T, d] -> [B, d] at the last attended token, wherever the padding is."""
    columns = torch.arange(states.shape[1], device=states.device)
    last = torch.where(attention_mask, columns, -1).max(1).values
    return states[torch.arange(len(last), device=last.device), last]


def _config(source: Model, num_labels: int | None = None) -> PretrainedConfig:
    """Every dropout at 0: with dropout on, two looks at one token disagree (BUGS A13)."""
    head = {} if num_labels is None else {"num_labels": num_labels}
    config = AutoConfig.from_pretrained(
        source.path, revision=source.revision, trust_remote_code=False, **head
    )
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _options(source: Model) -> dict[str, Any]:
    dtype, quantized = getattr(torch, source.dtype), {}
    if source.adapter is not None and source.adapter.quantize is not None:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=source.adapter.quantize, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
        quantized = {"quantization_config": four_bits}
    return quantized | {
        "revision": source.revision, "dtype": dtype, "attn_implementation": source.attention,
        "trust_remote_code": False,
    }  # fmt: skip


def _load_scalar(source: Model, head_seed: int | None) -> PreTrainedModel:
    """A sequence classifier with one label.

    Where the folder has no head (a causal model's), it starts at zero, or from N(0, 1 / (d + 1)) seeded by
    ``head_seed`` (arXiv:2009.01325, appendix B.1): equal on all ranks.
    """
    model, report = AutoModelForSequenceClassification.from_pretrained(
        source.path, config=_config(source, num_labels=1), output_loading_info=True, **_options(source)
    )
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"{source.path}: {type(model).__name__} has no linear `score` layer with one output; use a "
            "decoder of AutoModelForSequenceClassification (Llama, Qwen, Gemma, GPT-2, ...)"
        )
    _refuse_missing(source, [name for name in report["missing_keys"] if not name.startswith("score.")])
    if report["missing_keys"]:
        with torch.no_grad():
            head.weight.zero_()
            if head_seed is not None:
                seeded = torch.Generator().manual_seed(head_seed)
                noise = torch.randn(head.weight.shape, generator=seeded)
                head.weight.copy_(noise / (head.in_features + 1) ** 0.5)
    model.score = ScalarHead(head)
    if model.config.pad_token_id is None:  # Transformers refuses to classify a batch without one
        eos = model.config.eos_token_id
        model.config.pad_token_id = eos[0] if isinstance(eos, list) else eos or 0
    if source.liger:
        apply_liger_kernel(model, _LIGER)
    return model


def _refuse_missing(source: Model, missing: Iterable[str]) -> None:
    """Transformers would fill them with random numbers and a warning."""
    if names := sorted(missing):
        raise ValueError(f"{source.path} lacks the weights {names[:5]}; give the folder of a whole model")


@torch.no_grad()
def _check_head(policy: PolicyModel, probe: Tensor, expected: Tensor) -> None:
    """Compares our log-probs of a few tokens with the model's own, once at load.

    An architecture that changes its logits after ``lm_head`` in a way ``TokenHead`` does not know would
    otherwise train silently on wrong numbers.
    """
    ones = torch.ones_like(probe, dtype=torch.bool)
    ours = policy(probe, ones, ones, 1.0)[0][:, 1:]
    theirs = expected[:, :-1].gather(-1, probe[:, 1:, None]).squeeze(-1)
    worst = float((ours - theirs).abs().max())
    if not worst <= (0.1 if policy.model.dtype == torch.bfloat16 else 1e-3):
        raise ValueError(
            f"{type(policy.model).__name__} changes its logits after lm_head in an unknown way (log-probs "
            f"off by {worst:.3g}); add the change to actors/heads.py:TokenHead"
        )
