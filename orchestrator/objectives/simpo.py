"""Simple preference optimisation: the mean log-prob of a response is its reward, with a margin to reach.

    r(y) = beta / |y| log p(y|x)
    loss = -log sigmoid(r(chosen) - r(rejected) - gamma)          (arXiv:2405.14734 eq. 6)

No reference. Dividing by the length takes away what DPO gives to long responses.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat

from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.objectives._base import halves, pair_loss, response_logprobs, smoothed
from orchestrator.objectives._pairs import PairObjective


class SimPO(PairObjective):
    """Simple preference optimisation, without a reference."""

    name: ClassVar[str] = "simpo"

    beta: PositiveFloat = 2.0
    """Scale of the mean log-prob."""
    gamma: NonNegativeFloat = 1.0
    """Margin that the chosen reward is to have; the paper searches gamma / beta in 0.3 to 0.8."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong (not in the paper; the authors' code has it)."""

    def loss(self, output: PolicyOutput, part: Examples) -> Loss:
        """[b] loss of each pair at its even row."""
        logprobs, lengths = response_logprobs(output, part)
        rewards = self.beta * logprobs / lengths
        chosen, rejected = halves(rewards)
        values = smoothed(chosen - rejected - self.gamma, self.label_smoothing)
        return pair_loss(values, rewards, output, part)


CONFIG = SimPO
