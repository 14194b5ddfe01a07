"""Kahneman-Tversky optimisation: single responses called good or bad, no pairs (arXiv:2402.01306 eq. 8).

    r    = log p(y|x) - log p_ref(y|x)
    z    = max(0, mean over the batch of log p(y'|x) - log p_ref(y'|x)), y' another prompt's response
    good: desirable   (1 - sigmoid(beta (r - z)))
    bad:  undesirable (1 - sigmoid(beta (z - r)))

z estimates the KL of the policy from the reference, the point of reference of gains and losses; no gradient
flows through it (section 4.1). It is taken once over the whole minibatch and travels in ``Examples.kl``, so
micro-batches and ranks do not change it. The mismatched pairs are a fixed shift of the data set, so that
the reference can answer for them once and for all; each is of another prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from orchestrator.batch import Examples, Loss, PolicyOutput
from orchestrator.objectives._base import Layout, Objective, log_ratios, response_logprobs

if TYPE_CHECKING:
    from torch import Tensor


class KTO(Objective):
    """Kahneman-Tversky optimisation on unpaired good and bad responses."""

    name: ClassVar[str] = "kto"
    stage: ClassVar[Literal["sft", "reward_model", "preference"]] = "preference"
    layout: ClassVar[Layout] = "labels"
    needs_reference: ClassVar[bool] = True
    needs_kl: ClassVar[bool] = True

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    desirable: PositiveFloat = 1.0
    """Weight of good responses; the paper keeps desirable x good / (undesirable x bad) in [1, 4/3]."""
    undesirable: PositiveFloat = 1.0
    """Weight of bad responses."""

    def loss(self, output: PolicyOutput, part: Examples) -> Loss:
        """[b] loss of each row; ``targets`` are 1 for good and 0 for bad responses."""
        if part.targets is None:
            raise ValueError("kto needs a label for every row; name its column in label_key")
        good = part.targets > 0.5  # noqa: PLR2004 - labels are 1 and 0
        gain = self.beta * (log_ratios(output, part) - part.kl)
        values = (self.desirable * (-gain).sigmoid()).where(good, self.undesirable * gain.sigmoid())
        rewards, said = (gain + self.beta * part.kl).detach(), response_logprobs(output, part)[0].detach()
        figures = {"good_fraction": good.to(rewards.dtype)}
        for name, each in (("reward", rewards), ("logprob", said)):
            figures[f"chosen_{name}"] = each.where(good, 0.0)
            figures[f"rejected_{name}"] = each.where(~good, 0.0)
        return Loss(values=values, metrics=figures)

    def weights(self, part: Examples) -> Tensor:
        """[b] 1 / rows of the minibatch."""
        return part.tokens.new_ones(len(part.tokens)).float() / max(1, len(part.tokens))

    def summarize(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Means over the good and over the bad rows, each by their own number."""
        figures = dict(metrics)
        share = figures["good_fraction"]
        for side, part in (("chosen", share), ("rejected", 1 - share)):
            for name in (f"{side}_reward", f"{side}_logprob"):
                if part > 0:
                    figures[name] /= part
                else:
                    del figures[name]
        if 0 < share < 1:
            figures["margin"] = figures["chosen_reward"] - figures["rejected_reward"]
        return figures


CONFIG = KTO
