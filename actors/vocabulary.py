"""Log-probs and entropy from hidden states by blocks of tokens: [tokens, vocabulary] is never held at once.

    z = softcap(scale h W^T + b) / temperature        logits of one token, [V]
    log p(a) = z_a - logsumexp(z)                     H = logsumexp(z) - sum_j p_j z_j
    d log p(a) / d z_j = [j = a] - p_j                dH / d z_j = -p_j (log p_j + H)

One block of logits lives at a time, where autograd would keep logits, log-softmax and their gradient for
every token. What turns it into gradients is how the loss depends on each log-prob and entropy (its slopes):

    ``BlockedLogprobs``  they come with the backward pass, for which the logits are computed a second time:
                         a third more work in the projection
    ``BlockedLoss``      they are asked for in the forward pass, which is possible where the loss of a token
                         reads no other token; each block is turned into gradients while it is there
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# (log-probs [r], their entropy [r], which tokens those are) -> the loss by each of them, [r] and [r].
Slopes = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]


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
        for block in _blocks(states, shape):
            z, _ = _logits(states[block], weight, bias, shape)
            normalizer[block] = z.logsumexp(-1)
            logprobs[block] = _at(z, targets[block]) - normalizer[block]
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
        gradients = _Gradients(states, weight, bias, ctx.needs_input_grad)
        for block in _blocks(states, ctx.shape):
            z, saturation = _logits(states[block], weight, bias, ctx.shape)
            log_p = z.sub_(normalizer[block, None])
            p = log_p.exp() if ctx.shape.entropy else log_p.exp_()
            slopes = by_logprobs[block], by_entropy[block]
            d = _by_logits(p, log_p, targets[block], entropy[block], slopes, saturation, ctx.shape)
            gradients.add(block, d)
        return *gradients.answer(), None, None


class BlockedLoss(torch.autograd.Function):
    """(as above, slopes) -> log-probs [N], entropy [N], both as data, and a scalar 0.0 that carries the
    gradient: d scalar / d x is sum_t slope_t d log p_t / dx, for any x. Add it to the loss that the slopes
    are of, computed from the log-probs as data; whatever multiplies the sum multiplies the gradient."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - autograd takes arguments by place
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: Shape,
        slopes: Slopes,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = states.new_empty(len(states), dtype=torch.float32)
        entropy = torch.zeros_like(logprobs)
        gradients = _Gradients(states, weight, bias, ctx.needs_input_grad)
        for block in _blocks(states, shape):
            z, saturation = _logits(states[block], weight, bias, shape)
            z.sub_(z.amax(-1, keepdim=True))
            own = _at(z, targets[block])
            p = z.exp() if shape.entropy else z.exp_()
            total = p.sum(-1)
            p.div_(total[:, None])
            logprobs[block] = own - total.log()
            if shape.entropy:
                log_p = z.sub_(total.log()[:, None])
                entropy[block] = -(p * log_p).sum(-1)
            found = slopes(logprobs[block], entropy[block], block)
            d = _by_logits(p, z, targets[block], entropy[block], found, saturation, shape)
            gradients.add(block, d)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(logprobs, entropy)
        return logprobs, entropy, logprobs.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, __: Tensor, by_carrier: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.answer(by_carrier), None, None, None


class _Gradients:
    """Of states, weight and bias, those that are wanted, added up block by block."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        self._states, self._weight = states, weight
        self._by_states = torch.empty_like(states) if wanted[0] else None
        # Blocks are added up in float32, whatever the weights are kept in.
        self._by_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self._by_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        )

    def add(self, block: slice, d: Tensor) -> None:
        """``d`` [r, V]: by the products of states and weight."""
        d = d.to(self._weight.dtype)
        if self._by_states is not None:
            self._by_states[block] = d @ self._weight
        if self._by_weight is not None:
            if d.dtype == torch.float32:
                self._by_weight.addmm_(d.T, self._states[block])
            else:
                self._by_weight += d.T @ self._states[block]
        if self._by_bias is not None:
            self._by_bias += d.sum(0)

    def answer(self, times: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the weights' type; multiplied, once, by the scalar ``times``."""

        def final(d: Tensor | None) -> Tensor | None:
            if d is None:
                return None
            return (d if times is None else d.mul_(times)).to(self._weight.dtype)

        return final(self._by_states), final(self._by_weight), final(self._by_bias)


def _blocks(states: Tensor, shape: Shape) -> list[slice]:
    return [slice(begin, begin + shape.rows) for begin in range(0, len(states), shape.rows)]


def _at(rows: Tensor, targets: Tensor) -> Tensor:
    """[r, V], [r] -> [r]."""
    return rows.gather(-1, targets[:, None]).squeeze(-1)


def _by_logits(  # noqa: PLR0913, PLR0917 - the terms of a formula
    p: Tensor,
    log_p: Tensor,
    targets: Tensor,
    entropy: Tensor,
    slopes: tuple[Tensor, Tensor],
    saturation: Tensor | None,
    shape: Shape,
) -> Tensor:
    """[r, V] gradient by what the projection gives, in the place of ``p``; ``log_p``, where the entropy is
    asked for, is spent."""
    by_logprobs, by_entropy = (slope[:, None] for slope in slopes)
    if shape.entropy:
        d = p.mul_(log_p.add_(entropy[:, None]).mul_(by_entropy).add_(by_logprobs)).neg_()
    else:
        d = p.mul_(-by_logprobs)
    d.scatter_add_(-1, targets[:, None], by_logprobs)
    if shape.scale != shape.temperature:
        d.mul_(shape.scale / shape.temperature)
    return d if saturation is None else d.mul_(saturation)


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
