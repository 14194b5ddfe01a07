"""Proximal policy optimisation with a critic (arXiv:1707.06347), as used on language models
(arXiv:2203.02155).

Rewards per token: the sequence's reward on its last action, minus kl_coef times the KL to the reference on
every action. Advantages by GAE, whitened over the action tokens of the whole batch; the policy is clipped
around the policy before the step, the value around the value before the step.

Semantics follow OpenRLHF except where it is wrong: tokens between turns are not counted as steps, KL is not
clamped, log-ratios are not clamped, masked values never enter. ``objective: policy_gradient`` is the plain
actor-critic; with gae_lambda 1 and a critic that says nothing it is REINFORCE.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from orchestrator.algorithms._base import Advantages, AlgorithmConfig
from orchestrator.batch import Batch, Experience, Loss
from orchestrator.estimators import gae, token_rewards, whiten
from orchestrator.kl import Estimator, next_coef
from orchestrator.settings import Fraction
from orchestrator.surrogate import clipped_surrogate, clipped_value_loss, log_ratios, unclipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class PPO(AlgorithmConfig):
    """Clipped policy and value losses over GAE advantages."""

    name: ClassVar[str] = "ppo"
    token_wise: ClassVar[bool] = True
    has_critic: ClassVar[bool] = True

    objective: Literal["clip", "penalty", "policy_gradient"] = "clip"
    """clip (eq. 7); penalty: ratio times advantage minus step_kl_coef times KL(old || new) (eq. 8), whose
    coefficient is halved and doubled around step_kl_target; policy_gradient: neither."""
    clip_low: PositiveFloat = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio counts up to 1 + clip_high; more than clip_low is DAPO's clip-higher."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of a bad action whose ratio exploded, as a multiple of its advantage
    (arXiv:1912.09729)."""
    step_kl_coef: PositiveFloat = 1.0
    """objective=penalty: weight of KL(old || new) at the start."""
    step_kl_target: PositiveFloat = 0.01
    """objective=penalty: the KL of one step, in nats per token, that the coefficient is steered to."""
    value_clip: PositiveFloat | None = 0.2
    """A new value counts within this distance of the old one; null: no clipping."""
    gamma: Fraction = 1.0
    """Discount per action token."""
    gae_lambda: Fraction = 0.95
    """GAE: 1 is Monte Carlo, 0 one-step TD."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of the batch to mean 0, variance 1."""
    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL to the reference, at the start; 0 runs without a reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether that KL is taken from the reward or added to the loss."""
    kl_estimator: Estimator = "k1"
    """Estimator of that KL; k1 is unbiased in the reward."""

    @model_validator(mode="after")
    def _one_controller(self) -> Self:
        if self.objective == "penalty" and self.kl_controller != "fixed":
            raise ValueError(
                f"objective=penalty steers step_kl_coef, so kl_controller={self.kl_controller} has nothing "
                "to steer; use kl_controller=fixed, or objective=clip"
            )
        return self

    def advantages(self, batch: Batch, penalty: Tensor, values: Tensor | None) -> Advantages:
        assert values is not None
        mask = batch.action_mask
        rewards = token_rewards(batch.rewards, penalty, mask)
        advantages, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.gae_lambda)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)
        return Advantages(advantages=advantages, returns=returns)

    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        if self.objective == "clip":
            return clipped_surrogate(
                logprobs, old, part, low=self.clip_low, high=self.clip_high, dual=self.dual_clip
            )
        loss = unclipped_surrogate(logprobs, old, part)
        if self.objective == "policy_gradient":
            return loss
        moved = log_ratios(logprobs, old, part)  # under old: KL(old || new) by k3, exact in its gradient
        return Loss(values=loss.values + part.kl_coef * (moved.exp() - 1 - moved), metrics={})

    def value_loss(self, values: Tensor, part: Experience) -> Loss:
        return clipped_value_loss(values, part, clip=self.value_clip)

    @property
    def initial_kl_coef(self) -> float:
        """With objective=penalty the controlled coefficient is that of the step's own KL."""
        return self.step_kl_coef if self.objective == "penalty" else self.kl_coef

    def next_kl_coef(self, coef: float, metrics: dict[str, float], num_sequences: int) -> float:
        if self.objective != "penalty":
            return super().next_kl_coef(coef, metrics, num_sequences)
        measured = metrics.get("actor/approx_kl")
        if measured is None:
            return coef
        return next_coef(coef, measured, num_sequences, "doubling", self.step_kl_target, self.kl_horizon)

    def experience(
        self, batch: Batch, scores: dict[str, Tensor], kl_coef: float
    ) -> tuple[Experience, dict[str, float]]:
        if self.objective != "penalty":
            return super().experience(batch, scores, kl_coef)
        experience, metrics = super().experience(batch, scores, self.kl_coef)
        return replace(experience, kl_coef=kl_coef), metrics

    def reference_coef(self, part: Experience) -> float:
        return self.kl_coef if self.objective == "penalty" else part.kl_coef


CONFIG = PPO
