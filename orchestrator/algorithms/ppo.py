"""Proximal policy optimisation with a critic (arXiv:1707.06347), as used on language models
(arXiv:2203.02155).

Rewards per token: the sequence's reward on its last action, minus kl_coef times the KL to the reference on
every action. Advantages by GAE, whitened over the action tokens of the whole batch; the policy is clipped
around the policy before the step, the value around the value before the step.

With kl_coef 0 the reference is never started. Semantics follow OpenRLHF except where it is wrong: tokens
between turns are not counted as steps, KL is not clamped, log-ratios are not clamped, masked values never
enter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from orchestrator.algorithms._base import AlgorithmConfig
from orchestrator.batch import Batch, Experience, Loss, PolicyOutput
from orchestrator.estimators import gae, kl, masked_mean, token_rewards, whiten
from orchestrator.surrogate import clipped_surrogate, clipped_value_loss

if TYPE_CHECKING:
    from torch import Tensor

UnitInterval = Annotated[float, Field(ge=0, le=1)]


class PPO(AlgorithmConfig):
    """Clipped policy and value losses over GAE advantages."""

    name: ClassVar[str] = "ppo"

    clip_low: PositiveFloat = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio counts up to 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of a bad action whose ratio exploded, as a multiple of its advantage
    (arXiv:1912.09729)."""
    value_clip: PositiveFloat | None = 0.2
    """A new value counts within this distance of the old one; null: no clipping."""
    gamma: UnitInterval = 1.0
    """Discount per action token."""
    gae_lambda: UnitInterval = 0.95
    """GAE: 1 is Monte Carlo, 0 one-step TD."""
    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL to the reference in the reward; 0 runs without a reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of that KL; k1 is unbiased in the reward."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of the batch to mean 0, variance 1."""
    reward_clip: PositiveFloat | None = None
    """Sequence rewards are clipped to +- this before the KL is subtracted; null: no clipping."""
    entropy_coef: NonNegativeFloat | None = None
    """Weight of an entropy bonus; 0 only logs the entropy; null does not compute it."""

    def roles(self) -> frozenset[str]:
        return frozenset({"critic", "reference"} if self.kl_coef > 0 else {"critic"})

    def wants_scores(self, num_updates: int) -> bool:
        return num_updates > 1 or self.kl_coef > 0

    @property
    def wants_entropy(self) -> bool:
        return self.entropy_coef is not None

    def experience(
        self, batch: Batch, scores: dict[str, Tensor], kl_coef: float
    ) -> tuple[Experience, dict[str, float]]:
        mask, values = batch.action_mask, scores["critic"]
        metrics: dict[str, float] = {}
        rewards = (
            batch.rewards
            if self.reward_clip is None
            else batch.rewards.clamp(-self.reward_clip, self.reward_clip)
        )
        penalty = values.new_zeros(values.shape)
        if self.kl_coef > 0:
            drift = kl(scores["actor"], scores["reference"], mask, self.kl_estimator)
            penalty = self.kl_coef * drift
            metrics["kl"] = float(masked_mean(drift, mask))
        advantages, returns = gae(
            token_rewards(rewards, penalty, mask), values, mask, gamma=self.gamma, lam=self.gae_lambda
        )
        metrics |= {"returns": float(masked_mean(returns, mask)), "values": float(masked_mean(values, mask))}
        experience = Experience(
            tokens=batch.tokens,
            attention_mask=batch.attention_mask,
            action_mask=mask,
            rollout_logprobs=batch.rollout_logprobs,
            old_logprobs=scores.get("actor"),
            advantages=whiten(advantages, mask) if self.whiten_advantages else advantages,
            old_values=values,
            returns=returns,
            ref_logprobs=scores.get("reference"),
        )
        return experience, metrics

    def policy_loss(self, policy: PolicyOutput, part: Experience) -> Loss:
        loss = clipped_surrogate(
            policy.logprobs, part, low=self.clip_low, high=self.clip_high, dual=self.dual_clip
        )
        if policy.entropy is None:
            return loss
        bonus = (self.entropy_coef or 0.0) * policy.entropy
        return Loss(values=loss.values - bonus, metrics={**loss.metrics, "entropy": policy.entropy.detach()})

    def value_loss(self, values: Tensor, part: Experience) -> Loss:
        return clipped_value_loss(values, part, clip=self.value_clip)


CONFIG = PPO
