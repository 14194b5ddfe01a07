"""Log-probs and entropy from hidden states by blocks of tokens: [tokens, vocabulary] is never held at once.

    z = softcap(scale h W^T + b) / temperature        logits of one token, [V]
    log p(a) = z_a - logsumexp(z)                     H = logsumexp(z) - sum_j p_j z_j

The backward pass computes the logits of a block a second time and turns them, in place, into gradients:

    d log p(a) / d z_j = [j = a] - p_j                dH / d z_j = -p_j (log p_j + H)

A third of the projection's work is done twice; in exchange one block of logits lives at a time, where
autograd would keep logits, log-softmax and their gradient for every token.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What happens between ``lm_head`` and the softmax."""

    scale: float  # of the logits; 1.0: none
    softcap: float | None  # c tanh(z / c); None: none
    temperature: float
    rows: int  # tokens in a block
    entropy: bool  # whether it is asked for; two passes over the logits less without


class BlockedLogprobs(torch.autograd.Function):
    """(states [N, d], weight [V, d], bias [V] or None, targets [N], shape) -> log-probs [N], entropy [N].

    The entropy is zeros unless it is asked for.

    The weight is read anew in the backward pass, where ZeRO-3 has gathered it again (its hooks sit on the
    module whose ``forward`` calls this).
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        logprobs = states.new_empty(len(states), dtype=torch.float32)
        entropy, normalizer = torch.zeros_like(logprobs), torch.empty_like(logprobs)
        for begin in range(0, len(states), shape.rows):
            block = slice(begin, begin + shape.rows)
            z, _ = _logits(states[block], weight, bias, shape)
            normalizer[block] = z.logsumexp(-1)
            logprobs[block] = z.gather(-1, targets[block, None]).squeeze(-1) - normalizer[block]
            if shape.entropy:
                p = (z - normalizer[block, None]).exp_()
                entropy[block] = normalizer[block] - p.mul_(z).sum(-1)
        ctx.save_for_backward(states, weight, bias, targets, normalizer, entropy)
        ctx.shape = shape
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprobs: Tensor, by_entropy: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        shape, (for_states, for_weight, for_bias, *_) = ctx.shape, ctx.needs_input_grad
        d_states = torch.empty_like(states) if for_states else None
        # Blocks are added up in float32, whatever the weights are kept in.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias else None
        for begin in range(0, len(states), shape.rows):
            block = slice(begin, begin + shape.rows)
            z, saturation = _logits(states[block], weight, bias, shape)
            log_p = z.sub_(normalizer[block, None])
            factor = by_logprobs[block, None]
            if shape.entropy:
                inner = (log_p + entropy[block, None]).mul_(by_entropy[block, None]).add_(factor)
                d = log_p.exp_().mul_(inner).neg_()
            else:
                d = log_p.exp_().mul_(-factor)
            d.scatter_add_(-1, targets[block, None], factor)
            d.mul_(1.0 / shape.temperature)
            if saturation is not None:
                d.mul_(saturation)
            d = d.mul_(shape.scale).to(weight.dtype) if shape.scale != 1.0 else d.to(weight.dtype)
            if d_states is not None:
                d_states[block] = d @ weight
            if d_weight is not None:
                if d.dtype == torch.float32:
                    d_weight.addmm_(d.T, states[block])
                else:
                    d_weight += d.T @ states[block]
            if d_bias is not None:
                d_bias += d.sum(0)
        return (
            d_states,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _logits(
    states: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """[r, V] float32 at the temperature, of our own memory; and d softcap(z) / dz, [r, V], where there is
    one."""
    z, saturation = F.linear(states, weight, bias), None
    if shape.scale != 1.0:
        z = z.mul_(shape.scale)
    if shape.softcap:
        z = z.div_(shape.softcap).tanh_()
        saturation = 1 - z.float().square()
        z = z.mul_(shape.softcap)
    z = z.float()
    return z if shape.temperature == 1.0 else z.div_(shape.temperature), saturation
