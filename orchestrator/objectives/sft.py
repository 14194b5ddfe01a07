"""Supervised fine-tuning: make the demonstrated tokens likely.

    loss = -sum over response tokens of log p(token | everything before it) / number of response tokens

Maximum likelihood of the demonstrations (InstructGPT, arXiv:2203.02155 section 3.5). Every token of a
minibatch weighs the same, however many rows, ranks or micro-batches it is cut into: a mean per row would
train the tokens of short answers harder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.objectives._base import Layout, Objective

if TYPE_CHECKING:
    from torch import Tensor


class SFT(Objective):
    """Negative log-likelihood of the trained tokens."""

    name: ClassVar[str] = "sft"
    stage: ClassVar[Literal["sft", "reward_model", "preference"]] = "sft"
    layout: ClassVar[Layout] = "examples"
    token_wise: ClassVar[bool] = True

    def loss(self, output: PolicyOutput, part: Examples) -> Loss:
        """[b, T] negative log-prob of every trained token, 0 elsewhere, whatever the model says there."""
        mask = part.action_mask
        values = -output.logprobs.where(mask, 0.0)
        return Loss(values=values, metrics={"token_probability": (-values.detach()).exp().where(mask, 0.0)})

    def weights(self, part: Examples) -> Tensor:
        """[b, T] 1 / (trained tokens of the minibatch) on each of them."""
        ones = part.action_mask.float()
        return ones / ones.sum().clamp(min=1)


CONFIG = SFT
