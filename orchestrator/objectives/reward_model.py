"""A reward model from preference pairs: the chosen response is to score higher than the rejected one.

    loss = -log sigmoid(score(chosen) - score(rejected)), averaged over the pairs

The Bradley-Terry likelihood of the preferences (InstructGPT, arXiv:2203.02155 eq. 1). It fixes only
differences: a constant added to every score changes nothing, so the level of a score has no meaning.

Row 2i is chosen, row 2i+1 rejected. The pair's loss and figures stand on the even row, and the odd row
carries 0 and weighs 0: a pair must not be cut, or its half would be compared with a stranger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.batch import Examples, Loss

if TYPE_CHECKING:
    from torch import Tensor


def loss(output: Tensor, part: Examples) -> Loss:
    """[b] scores -> [b] loss of each pair at its even row, 0 at odd rows; ValueError when a pair was cut."""
    if len(output) % 2:
        raise ValueError(
            f"{len(output)} rows are not whole pairs (chosen, rejected); cut minibatches at even rows"
        )
    margin = output[0::2] - output[1::2]
    # -log sigmoid(m) = log(1 + exp(-m)), in the form that stays finite and exact for any margin
    values = margin.neg().logaddexp(margin.new_zeros(()))
    margin = margin.detach()
    right = (margin > 0).to(margin.dtype) + (margin == 0).to(margin.dtype) / 2  # a tie is half right
    return Loss(
        values=_on_even_rows(values),
        metrics={"accuracy": _on_even_rows(right), "margin": _on_even_rows(margin)},
    )


def weights(part: Examples) -> Tensor:
    """[b] 1 / (pairs of the minibatch) on even rows, 0 on odd rows."""
    ones = part.tokens.new_ones(len(part.tokens) // 2).float()
    return _on_even_rows(ones / max(1, len(ones)))


def _on_even_rows(pairs: Tensor) -> Tensor:
    """[n] -> [2n]: x0 0 x1 0 ..."""
    rows = pairs.new_zeros((len(pairs), 2))
    rows[:, 0] = pairs
    return rows.flatten()
