"""Odds-ratio preference optimisation: SFT on the chosen response and a penalty on the rejected one, at once.

    log p(y)  = mean over the tokens of y of log p(token | before)
    odds(y)   = p(y) / (1 - p(y))
    loss      = -log p(chosen) - odds_coef log sigmoid(log(odds(chosen) / odds(rejected)))
                                                                    (arXiv:2403.07691 eqs. 3, 6, 7)

No reference, and no SFT stage before it. The likelihood is of the response, as in the paper's eq. 2; the
authors' code and TRL add the prompt's tokens to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveFloat

from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.objectives._base import halves, pair_loss, response_logprobs, softplus
from orchestrator.objectives._pairs import PairObjective

if TYPE_CHECKING:
    from torch import Tensor

CERTAIN = -1e-6  # the mean log-prob at which 1 - p would lose its last digits in float32


class ORPO(PairObjective):
    """Odds-ratio preference optimisation, without a reference."""

    name: ClassVar[str] = "orpo"

    odds_coef: PositiveFloat = 0.1
    """Weight of the odds-ratio term (the paper's lambda)."""

    def loss(self, output: PolicyOutput, part: Examples) -> Loss:
        """[b] loss of each pair at its even row."""
        logprobs, lengths = response_logprobs(output, part)
        means = logprobs / lengths
        odds = log_odds(means)
        chosen, rejected = halves(odds)
        values = -halves(means)[0] + self.odds_coef * softplus(rejected - chosen)
        return pair_loss(values, self.odds_coef * odds, output, part)


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p < 0; log(1 - p) through expm1, exact where p is near 0 or 1."""
    below = logprobs.clamp(max=CERTAIN)
    return below - (-below.expm1()).log()


CONFIG = ORPO
