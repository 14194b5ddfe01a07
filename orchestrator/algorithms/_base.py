"""What every algorithm file offers, and what all of them share: the KL, the off-policy weight, the entropy.

An algorithm's own file says three things: its settings, ``advantages`` (rewards -> what each token was worth)
and ``surrogate`` (the loss of a token). The order around them is here, once:

    experience   KL to the reference, where it belongs in the reward -> advantages
    policy_loss  surrogate, times the off-policy weight -> plus KL, where it belongs in the loss
                 -> minus entropy

Algorithms use tensor methods only and never import torch at run time: the configuration tree holds them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from orchestrator.batch import Batch, Experience, Loss, PolicyOutput
from orchestrator.corrections import Correction, correction_weights
from orchestrator.estimators import flat_groups, masked_mean
from orchestrator.kl import Controller, Estimator, full_kl, kl, next_coef
from orchestrator.settings import Aggregate, Settings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """What an algorithm makes of the rewards of a batch."""

    advantages: Tensor  # [B, T] 0.0 off the action mask
    returns: Tensor | None = None  # [B, T] targets of the critic, where there is one


class AlgorithmConfig(Settings):
    """Frozen and picklable: it travels to the learners, which call its losses."""

    name: ClassVar[str]
    has_critic: ClassVar[bool] = False
    compares_siblings: ClassVar[bool] = False  # True: one sample per prompt gives no signal
    greedy_baseline: ClassVar[bool] = False  # True: a greedy response is drawn per prompt
    steps_on_groups: ClassVar[bool] = (
        False  # True: one loss reads several rows of a prompt (Experience.groups)
    )
    token_wise: ClassVar[bool] = False  # True: the surrogate of a token reads no other token's log-prob
    aggregate: ClassVar[Aggregate] = "token_mean"  # the paper's; rl.updates.aggregate overrides it

    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the reference, at the start; 0 runs without a reference."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Whether that KL is taken from the reward or added to the loss."""
    kl_estimator: Estimator = "k3"
    """k1, k2, k3 from the sampled token, or full: over the whole vocabulary, at the price of moving
    [tokens, vocabulary] between the roles."""
    kl_weighted: bool = False
    """In the loss: weigh the estimate by the ratio to the policy that drew the token, so that its gradient is
    that of the KL also after that policy was left (DeepSeek-V3.2); full needs no weight."""
    kl_controller: Controller = "fixed"
    """fixed; proportional (Ziegler et al.); doubling: halved below kl_target / 1.5, doubled above 1.5
    kl_target (Schulman et al.)."""
    kl_target: PositiveFloat = 0.1
    """Where the controllers steer the KL, in nats per token."""
    kl_horizon: PositiveFloat = 10000
    """Sequences over which the proportional controller acts."""
    entropy_coef: NonNegativeFloat | None = None
    """Weight of an entropy bonus; 0 only logs the entropy; null does not compute it."""
    correction: Correction = Correction()
    """Importance weights between engine and trainer."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.kl_coef > 0 and self.kl_in == "loss" and self.kl_estimator == "k1" and not self.kl_weighted:
            raise ValueError(
                "kl_estimator=k1 in the loss has a gradient of zero in expectation: it would do nothing. Use "
                "k2 or k3, set kl_weighted=true, or kl_in=reward"
            )
        if self.kl_weighted and self.kl_in == "reward":
            raise ValueError("kl_weighted=true weighs a KL in the loss, and kl_in=reward; set kl_in=loss")
        if self.kl_controller != "fixed" and self.kl_coef == 0:
            raise ValueError(
                f"kl_controller={self.kl_controller} multiplies kl_coef, which is 0 and stays so; "
                "set kl_coef above 0"
            )
        return self

    def roles(self) -> frozenset[str]:
        """Those of "critic" and "reference" that this algorithm, as configured, needs."""
        needed = {"critic"} if self.has_critic else set()
        return frozenset(needed | ({"reference"} if self.kl_coef > 0 else set()))

    def wants_scores(self, num_updates: int) -> bool:
        """Whether ``experience`` reads the actor's log-probs before the step, given the step's optimizer
        steps."""
        return num_updates > 1 or self._penalises

    @property
    def wants_entropy(self) -> bool:
        """Whether ``policy_loss`` reads the entropy of the whole distribution."""
        return self.entropy_coef is not None

    @property
    def wants_distribution(self) -> bool:
        """Whether actor and reference must give the log-probs of the whole vocabulary."""
        return self.kl_coef > 0 and self.kl_estimator == "full"

    @property
    def loss_is_token_wise(self) -> bool:
        """Whether ``policy_loss`` of a token reads no other token's log-prob."""
        return self.token_wise and not self.wants_distribution and not self.correction.reads_responses

    @property
    def initial_kl_coef(self) -> float:
        """The controlled coefficient before the first step."""
        return self.kl_coef

    def next_kl_coef(self, coef: float, metrics: dict[str, float], num_sequences: int) -> float:
        """The controlled coefficient after a step with these metrics; unchanged where they lack the KL."""
        measured = metrics.get("kl", metrics.get("actor/kl"))
        if measured is None:
            return coef
        return next_coef(coef, measured, num_sequences, self.kl_controller, self.kl_target, self.kl_horizon)

    def experience(
        self, batch: Batch, scores: dict[str, Tensor], kl_coef: float
    ) -> tuple[Experience, dict[str, float]]:
        """Rewards, already shaped, and scores ("actor" if wanted, "critic", "reference": [B, T];
        "actor_distribution", "reference_distribution": [B, T, V]) -> advantages and targets."""
        mask, metrics = batch.action_mask, {}
        scores = {name: score.detach() for name, score in scores.items()}  # data, whoever computed them
        penalty = batch.rollout_logprobs.new_zeros(mask.shape)
        if self._penalises:
            drift = self._drift(scores, mask)
            penalty = kl_coef * drift
            metrics["kl"] = float(masked_mean(drift, mask))
        elif "actor" in scores and "reference" in scores:
            metrics["kl"] = float(masked_mean(kl(scores["actor"], scores["reference"], mask, "k3"), mask))
        values = scores.get("critic")
        made = self.advantages(batch, penalty, values)
        if self.compares_siblings:
            flat = flat_groups(batch.rewards, batch.groups, mask.any(1))
            metrics["groups_without_signal"] = float(flat.double().mean())
        if values is not None and made.returns is not None:
            metrics |= {
                "returns": float(masked_mean(made.returns, mask)),
                "values": float(masked_mean(values, mask)),
            }
        in_loss = self.kl_coef > 0 and self.kl_in == "loss"
        experience = Experience(
            tokens=batch.tokens,
            attention_mask=batch.attention_mask,
            action_mask=mask,
            rollout_logprobs=batch.rollout_logprobs,
            old_logprobs=scores.get("actor"),
            advantages=made.advantages,
            old_values=values,
            returns=made.returns,
            ref_logprobs=scores.get("reference"),
            kl_coef=kl_coef,
            ref_distribution=scores.get("reference_distribution") if in_loss else None,
        )
        return experience, metrics

    @abstractmethod
    def advantages(self, batch: Batch, penalty: Tensor, values: Tensor | None) -> Advantages:
        """``penalty`` [B, T] is what the KL takes from each action's reward: 0 where it is in the loss."""

    @abstractmethod
    def surrogate(self, logprobs: Tensor, old: Tensor, part: Experience) -> Loss:
        """[B, T] loss per token of some rows, 0 off the mask. ``old`` are the log-probs before the step;
        where the update is its only one they are ``logprobs`` without gradient, and every ratio is 1."""

    def policy_loss(self, policy: PolicyOutput, part: Experience) -> Loss:
        """[B, T] loss per token of some rows."""
        mask, logprobs = part.action_mask, policy.logprobs
        old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        loss = self.surrogate(logprobs, old, part)
        values, metrics = loss.values, dict(loss.metrics)
        step = (logprobs.detach() - old).where(mask, 0.0)
        metrics["approx_kl"] = step.exp() - 1 - step  # k3 of the step itself: KL(old || new)
        if part.old_logprobs is None:  # else the driver compares the scores; later updates have moved away
            metrics["rollout_logprob_diff_mean"] = (old - part.rollout_logprobs).abs().where(mask, 0.0)
        if self.correction.rule != "none":
            weights, figures = correction_weights(old, part.rollout_logprobs, mask, self.correction)
            values, metrics = values * weights, metrics | figures
        if self.kl_coef > 0 and self.kl_in == "loss":
            drift = self._loss_drift(policy, old, part)
            values, metrics["kl"] = values + self.reference_coef(part) * drift, drift.detach()
        if policy.entropy is not None:
            entropy = policy.entropy.where(mask, 0.0)
            values, metrics["entropy"] = values - (self.entropy_coef or 0.0) * entropy, entropy.detach()
        return replace(loss, values=values, metrics=metrics)

    def value_loss(self, values: Tensor, part: Experience) -> Loss:
        """[B, T] loss per token of some rows; only for algorithms with a critic."""
        raise TypeError(f"{self.name} has no critic")

    def reference_coef(self, part: Experience) -> float:
        """The weight of the KL to the reference in this step."""
        return part.kl_coef

    @property
    def _penalises(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    def _drift(self, scores: dict[str, Tensor], mask: Tensor) -> Tensor:
        if self.kl_estimator == "full":
            return full_kl(scores["actor_distribution"], scores["reference_distribution"], mask)
        return kl(scores["actor"], scores["reference"], mask, self.kl_estimator)

    def _loss_drift(self, policy: PolicyOutput, old: Tensor, part: Experience) -> Tensor:
        mask = part.action_mask
        if self.kl_estimator == "full":
            assert policy.distribution is not None and part.ref_distribution is not None
            return full_kl(policy.distribution, part.ref_distribution, mask)
        assert part.ref_logprobs is not None
        drift = kl(policy.logprobs, part.ref_logprobs, mask, self.kl_estimator)
        if self.kl_weighted:
            weight = (policy.logprobs - old).where(mask, 0.0).exp()
            drift = drift * (weight.detach() if self.kl_estimator == "k2" else weight)
        return drift
