"""Direct preference optimisation: the policy's own log-ratios to the reference are the rewards.

    r(y) = beta (log p(y|x) - log p_ref(y|x))          implicit reward (arXiv:2305.18290 eq. 5)
    loss = -log sigmoid(r(chosen) - r(rejected))       eq. 7

``label_smoothing`` e > 0 is cDPO (arXiv:2305.18290's conservative form, Mitchell 2023, eq. 3): the label is
taken to be wrong with probability e, so margins stop growing at log((1 - e) / e).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat

from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.objectives._base import halves, log_ratios, pair_loss, smoothed
from orchestrator.objectives._pairs import PairObjective


class DPO(PairObjective):
    """Direct preference optimisation; with label_smoothing, cDPO."""

    name: ClassVar[str] = "dpo"
    needs_reference: ClassVar[bool] = True

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference: margins are beta times the difference of log-ratios."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong (cDPO)."""

    def loss(self, output: PolicyOutput, part: Examples) -> Loss:
        """[b] loss of each pair at its even row."""
        rewards = self.beta * log_ratios(output, part)
        chosen, rejected = halves(rewards)
        return pair_loss(smoothed(chosen - rejected, self.label_smoothing), rewards, output, part)


CONFIG = DPO
