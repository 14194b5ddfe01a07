"""Identity preference optimisation: the difference of log-ratios is drawn to 1 / (2 beta), and not beyond.

    h    = log(p(chosen) / p_ref(chosen)) - log(p(rejected) / p_ref(rejected))
    loss = (h - 1 / (2 beta))^2          (arXiv:2310.12036 eq. 17; beta is the paper's tau)

A squared error has a minimum at a finite margin, where DPO's logistic loss drives certain pairs without end.
The paper sums log-probs over the response, as OpenRLHF does; TRL averages them over its tokens
(``length_average``), which needs a smaller beta.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import PositiveFloat

from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.objectives._base import halves, log_ratios, pair_loss, response_logprobs
from orchestrator.objectives._pairs import PairObjective


class IPO(PairObjective):
    """Identity preference optimisation."""

    name: ClassVar[str] = "ipo"
    needs_reference: ClassVar[bool] = True

    beta: PositiveFloat = 0.1
    """The margin aimed at is 1 / (2 beta)."""
    length_average: bool = False
    """Average log-ratios over the tokens of a response (TRL) and not sum them (the paper, OpenRLHF)."""

    def loss(self, output: PolicyOutput, part: Examples) -> Loss:
        """[b] loss of each pair at its even row."""
        ratios = log_ratios(output, part)
        if self.length_average:
            ratios = ratios / response_logprobs(output, part)[1]
        chosen, rejected = halves(ratios)
        values = (chosen - rejected - 1 / (2 * self.beta)).square()
        return pair_loss(values, self.beta * ratios, output, part)


CONFIG = IPO
