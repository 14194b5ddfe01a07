"""Group-relative policy optimisation (arXiv:2402.03300 section 4.1): siblings of a prompt are each other's
baseline.

No critic. The KL to the reference is a term of the loss (k3), not of the reward. Deviations that others make
and this file does not: the standard deviation is the unbiased one, as in every peer; a group without signal
gets exactly 0; ``rl.updates.aggregate`` decides the token weights (the paper's is sequence_mean).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from orchestrator.algorithms._base import AlgorithmConfig
from orchestrator.batch import Batch, Experience, Loss, PolicyOutput
from orchestrator.estimators import group_advantages, kl, masked_mean
from orchestrator.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class GRPO(AlgorithmConfig):
    """Clipped policy loss over advantages normalised within each prompt's group."""

    name: ClassVar[str] = "grpo"
    compares_siblings: ClassVar[bool] = True

    clip_low: PositiveFloat = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio counts up to 1 + clip_high."""
    kl_coef: NonNegativeFloat = 0.001
    """Weight of the KL to the reference in the loss; 0 runs without a reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL; the paper's is k3."""
    divide_by_std: bool = True
    """Divide by the group's standard deviation; false keeps the scale of the rewards."""
    std_eps: PositiveFloat = 1e-6
    """Added to the standard deviation (verl, SkyRL 1e-6; TRL 1e-4; OpenRLHF 1e-9)."""

    def roles(self) -> frozenset[str]:
        return frozenset({"reference"} if self.kl_coef > 0 else set())

    def wants_scores(self, num_updates: int) -> bool:
        return num_updates > 1

    def experience(
        self, batch: Batch, scores: dict[str, Tensor], kl_coef: float
    ) -> tuple[Experience, dict[str, float]]:
        mask = batch.action_mask
        advantages = group_advantages(
            batch.rewards, batch.groups, mask.any(1), divide_by_std=self.divide_by_std, eps=self.std_eps
        )
        metrics = {"groups_without_signal": _flat_groups(batch)}
        if "actor" in scores and "reference" in scores:
            metrics["kl"] = float(masked_mean(kl(scores["actor"], scores["reference"], mask, "k3"), mask))
        experience = Experience(
            tokens=batch.tokens,
            attention_mask=batch.attention_mask,
            action_mask=mask,
            rollout_logprobs=batch.rollout_logprobs,
            old_logprobs=scores.get("actor"),
            advantages=advantages[:, None] * mask,
            old_values=None,
            returns=None,
            ref_logprobs=scores.get("reference"),
        )
        return experience, metrics

    def policy_loss(self, policy: PolicyOutput, part: Experience) -> Loss:
        loss = clipped_surrogate(policy.logprobs, part, low=self.clip_low, high=self.clip_high)
        if part.ref_logprobs is None:
            return loss
        drift = kl(policy.logprobs, part.ref_logprobs, part.action_mask, self.kl_estimator)
        return Loss(values=loss.values + self.kl_coef * drift, metrics={**loss.metrics, "kl": drift.detach()})


def _flat_groups(batch: Batch) -> float:
    """The share of groups whose rewards are all equal: they teach nothing."""
    num_groups = int(batch.groups.max()) + 1
    low = batch.rewards.new_full((num_groups,), float("inf")).scatter_reduce(
        0, batch.groups, batch.rewards, "amin"
    )
    high = batch.rewards.new_full((num_groups,), -float("inf")).scatter_reduce(
        0, batch.groups, batch.rewards, "amax"
    )
    return float((low == high).float().mean())


CONFIG = GRPO
