"""Models of a few thousand parameters with random weights, saved as ``from_pretrained`` folders."""

from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

VOCAB = 17


def llama(*, tied: bool = True, hidden: int = 16, layers: int = 2, vocab: int = VOCAB) -> LlamaConfig:
    """Rotary positions."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        attention_dropout=0.1,
        initializer_range=0.3,  # large enough that tokens differ by more than rounding
    )


def gpt2(*, dropout: float = 0.1) -> GPT2Config:
    """Learned absolute positions: a wrong position shows (rotary ones hide a common shift)."""
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )


def build(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return (GPT2LMHeadModel if isinstance(config, GPT2Config) else LlamaForCausalLM)(config)


def save(folder: Path, config: PretrainedConfig, *, seed: int = 0) -> str:
    """Writes the model and returns its folder as the text that ``Model.path`` takes."""
    build(config, seed=seed).save_pretrained(folder)
    return str(folder)
