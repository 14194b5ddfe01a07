"""Figures of a model on rows it was not trained on, each with what is needed to trust it.

The accuracy of a few hundred pairs is uncertain by several points: it comes with Wilson's 95 % interval
(J. Am. Stat. Assoc. 22, 1927), a loss with that of a mean over the units, from their spread. Calibration asks
if a margin means what Bradley-Terry says it means: among pairs that the model is 80 % sure of, it should be
right in 80 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.batch import Examples, PolicyOutput
from orchestrator.collate import collate_examples, collate_packed
from orchestrator.examples import Unit
from orchestrator.objectives._base import Objective
from orchestrator.supervised import SCORED_AT_ONCE, ReferenceScores, SupervisedScorer, with_reference

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
BINS = 10
PREFIX = "heldout_"


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """95 % interval of a share. Example: 8 of 10 gives (0.490, 0.943)."""
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return centre - half, centre + half


def calibration_error(margins: Tensor) -> float:
    """Expected calibration error (Guo et al., arXiv:1706.04599 eq. 3) of margins [n], chosen - rejected.

    The model is sure of its favourite with sigmoid(|margin|), between 1/2 and 1 in ten bins of equal width,
    and right where the margin is positive. 0: as often right as it is sure.
    """
    sure = margins.double().abs().sigmoid()
    right = (margins > 0).double() + (margins == 0).double() / 2
    bins = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, right - sure)
    return float(gaps.abs().sum() / len(margins))


def pair_figures(margins: Tensor) -> dict[str, float]:
    """Of margins [n], chosen - rejected; a tie is half right."""
    right = float((margins > 0).sum()) + float((margins == 0).sum()) / 2
    low, high = wilson(right, len(margins))
    return {
        "accuracy": right / len(margins),
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": float(margins.double().mean()),
        "calibration_error": calibration_error(margins),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Heldout:
    """What a model says of held-out rows."""

    figures: dict[str, float]
    losses: Tensor  # [units] float64: sum(losses) / sum(sizes) is the loss
    sizes: Tensor  # [units] float64: 1, or for SFT the trained tokens

    def figures_since(self, before: "Heldout | None") -> dict[str, float]:
        """With how much the loss of the same units changed, and the interval of the mean of their
        differences: narrower than those of the two losses where units differ more than models do."""
        if before is None:
            return self.figures
        change = self.losses - before.losses
        mean = float(change.sum() / self.sizes.sum())
        half = Z95 * standard_error(change, self.sizes)
        name = f"{PREFIX}loss_change"
        return {**self.figures, name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


async def measure(
    scorer: SupervisedScorer,
    units: Sequence[Unit],
    objective: Objective,
    *,
    pad_id: int,
    packed: bool = False,
    reference: ReferenceScores | None = None,
) -> Heldout:
    """Loss and metrics under the objective of the stage; of a reward model on pairs also how sure they are.

    Parts are pooled by their units, for SFT by their trained tokens, as one minibatch would weigh them.
    """
    sums: dict[str, float] = {}
    seen: list[Tensor] = []
    kls: list[float] = []
    total, losses, sizes = 0.0, list[Tensor](), list[Tensor]()
    for start in range(0, len(units), SCORED_AT_ONCE):
        drawn = units[start : start + SCORED_AT_ONCE]
        examples = (collate_packed if packed else collate_examples)(drawn, pad_id=pad_id)
        if reference is not None:
            numbers = range(start, start + len(drawn))
            examples = await with_reference(scorer, reference, numbers, drawn, examples, pad_id=pad_id)
            kls.append(examples.kl)
        scores = await scorer.score(examples)
        seen.append(scores)
        is_reward = objective.stage == "reward_model"
        output = scores if is_reward else PolicyOutput(logprobs=scores, entropy=None)
        size = float(examples.action_mask.sum()) if objective.layout == "examples" else float(len(drawn))
        total += size
        weights, loss = objective.weights(examples).double(), objective.loss(output, examples)
        for name, each in {"loss": loss.values, **loss.metrics}.items():
            sums[name] = sums.get(name, 0.0) + size * float((weights * each.double()).sum())
        losses.append(size * of_units(weights * loss.values.double(), examples))
        sizes.append(size * of_units(weights, examples))
    figures = objective.summarize({name: figure / total for name, figure in sums.items()})
    every, size_of = torch.cat(losses), torch.cat(sizes)
    half = Z95 * standard_error(every, size_of)
    figures |= {"loss_low": figures["loss"] - half, "loss_high": figures["loss"] + half}
    if kls and objective.needs_kl:
        figures["kl"] = sum(kls) / len(kls)
    if objective.stage == "reward_model" and objective.layout == "pairs":
        scores = torch.cat(seen)
        figures |= pair_figures(scores[0::2] - scores[1::2])
    elif "accuracy" in figures:
        low, high = wilson(figures["accuracy"] * len(units), len(units))
        figures |= {"accuracy_low": low, "accuracy_high": high}
    named = {f"{PREFIX}{name}": figure for name, figure in figures.items()}
    return Heldout(figures=named, losses=every, sizes=size_of)


def of_units(rows: Tensor, examples: Examples) -> Tensor:
    """[b] or [b, T] -> sums over each unit, [units]."""
    each = rows.flatten(1).sum(1) if rows.dim() > 1 else rows
    assert examples.groups is not None  # collate numbers them
    return each.new_zeros(int(examples.groups[-1]) + 1).index_add(0, examples.groups, each)


def standard_error(losses: Tensor, sizes: Tensor) -> float:
    """Of sum(losses) / sum(sizes), both [n] of independent units: the ratio estimator's (Cochran, Sampling
    Techniques, 1977, eq. 6.13). Units of equal size: their deviation / sqrt(n). 0 for a single unit."""
    n, total = len(losses), sizes.sum()
    rest = losses - losses.sum() / total * sizes
    return float((rest.square().sum() * n / max(1, n - 1)).sqrt() / total)
