"""Contrastive preference optimisation: DPO with a uniform reference, and a pull to the chosen response.

    loss = -log sigmoid(beta (log p(chosen) - log p(rejected))) + nll_coef NLL(chosen)
                                                                    (arXiv:2401.08417 eqs. 4 to 6)

No reference runs. The paper's NLL is summed over the response; its code and TRL average over tokens. Here
it is the mean over each response's tokens unless ``nll_sum``, and every pair weighs the same.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat

from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.objectives._base import halves, pair_loss, response_logprobs, smoothed
from orchestrator.objectives._pairs import PairObjective


class CPO(PairObjective):
    """Contrastive preference optimisation, without a reference."""

    name: ClassVar[str] = "cpo"

    beta: PositiveFloat = 0.1
    """Scale of the difference of log-probs."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong."""
    nll_coef: NonNegativeFloat = 1.0
    """Weight of the negative log-likelihood of the chosen response."""
    nll_sum: bool = False
    """Sum that likelihood over the response (the paper's equation) and not average it (its code, TRL)."""

    def loss(self, output: PolicyOutput, part: Examples) -> Loss:
        """[b] loss of each pair at its even row."""
        logprobs, lengths = response_logprobs(output, part)
        chosen, rejected = halves(logprobs)
        nll = -chosen if self.nll_sum else -chosen / halves(lengths)[0]
        values = smoothed(self.beta * (chosen - rejected), self.label_smoothing) + self.nll_coef * nll
        return pair_loss(values, self.beta * logprobs, output, part)


CONFIG = CPO
