"""Prefix, prompt and P-tuning: trained positions before every sequence, out of PEFT's encoders.

    prompt, p_tuning   n embeddings stand before those of the tokens; their hidden states are cut off again
    prefix             n keys and values stand before those of every layer

Either way a token's position counts them, as in PEFT: the first token is at n.
"""

from typing import Any

import torch
from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft.tuners import PrefixEncoder, PromptEmbedding, PromptEncoder
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from orchestrator.config import Adapter


class VirtualTokens(nn.Module):
    def __init__(self, adapter: Adapter, model: PreTrainedModel) -> None:
        super().__init__()
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        self.kind, self.count, self.num_layers = adapter.kind, adapter.virtual_tokens, text.num_hidden_layers
        self.kv_heads, self.head_dim = kv_heads, head_dim
        is_prefix = self.kind == "prefix"
        shape: dict[str, Any] = {
            "num_virtual_tokens": self.count,
            "num_layers": text.num_hidden_layers,
            "num_attention_heads": kv_heads if is_prefix else heads,
            "token_dim": head_dim * kv_heads if is_prefix else text.hidden_size,
            "num_transformer_submodules": 1,
        }
        self.config: PeftConfig
        if is_prefix:
            self.config = PrefixTuningConfig(**shape)
            self.encoder: nn.Module = PrefixEncoder(self.config)
        elif self.kind == "prompt":
            self.config = PromptTuningConfig(**shape)
            self.encoder = PromptEmbedding(self.config, model.get_input_embeddings())
        else:
            self.config = PromptEncoderConfig(**shape, encoder_hidden_size=text.hidden_size)
            self.encoder = PromptEncoder(self.config)

    def values(self) -> Tensor:
        """[n, ...]: what PEFT's folder keeps, the encoder's answer and not its weights."""
        numbers = torch.arange(self.count, device=next(self.encoder.parameters()).device)
        return self.encoder(numbers[None])[0]

    def inputs(
        self, model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor
    ) -> dict[str, Any]:
        """Arguments of the backbone for tokens [B, T]; the mask grows by n on the left."""
        rows, ahead = len(tokens), self.values()
        mask = attention_mask
        if mask is not None:
            mask = torch.cat([mask.new_ones(rows, self.count), mask], dim=1)
        if self.kind == "prefix":
            cache = DynamicCache()
            states = ahead.view(self.count, 2 * self.num_layers, self.kv_heads, self.head_dim)
            states = states.permute(1, 2, 0, 3)[:, None].expand(-1, rows, -1, -1, -1)
            for layer in range(self.num_layers):
                cache.update(states[2 * layer], states[2 * layer + 1], layer)
            return {
                "input_ids": tokens, "attention_mask": mask, "position_ids": positions + self.count,
                "past_key_values": cache,
            }  # fmt: skip
        embedded = model.get_input_embeddings()(tokens)
        before = torch.arange(self.count, device=tokens.device)[None].expand(len(positions), -1)
        return {
            "inputs_embeds": torch.cat([ahead.expand(rows, -1, -1).to(embedded.dtype), embedded], dim=1),
            "attention_mask": mask,
            "position_ids": torch.cat([before, positions + self.count], dim=1),
        }
