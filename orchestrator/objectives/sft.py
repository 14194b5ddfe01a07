"""Supervised fine-tuning: make the demonstrated tokens likely.

    loss = -sum over response tokens of log p(token | everything before it) / number of response tokens

Maximum likelihood of the demonstrations (InstructGPT, arXiv:2203.02155 section 3.5). Every token of a
minibatch weighs the same, however many rows, ranks or micro-batches it is cut into: a mean per row would
train the tokens of short answers harder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.minibatch import token_weights

if TYPE_CHECKING:
    from torch import Tensor


def loss(output: PolicyOutput, part: Examples) -> Loss:
    """[b, T] negative log-prob of every trained token, 0 elsewhere, whatever the model says there."""
    mask = part.action_mask
    values = -output.logprobs.where(mask, 0.0)
    return Loss(values=values, metrics={"token_probability": (-values.detach()).exp().where(mask, 0.0)})


def weights(part: Examples) -> Tensor:
    """[b, T] 1 / (trained tokens of the minibatch) on each of them."""
    return token_weights(part.action_mask, "token_mean")
