"""One frozen base, four roles: what PPO asks of four models, asked of one with adapters and heads.

    reference   the base, adapters off
    actor       the base with the actor's adapter, through lm_head
    critic      the same states, through a value head: one pass and one optimizer step serve both
    reward      the base with the adapter and the score head that the reward_model stage trained

The loss of a step is the policy's plus ``value_coef`` times the critic's. Numbers are those of separate
workers with the same weights; the memory is that of one.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.actor import Actor
from actors.adapter import NAME, WEIGHTS, adapt, add_trained, using
from actors.backend import Backend
from actors.heads import ScalarHead
from actors.learner import LossFunction, MicroBatches
from actors.model import PolicyModel, last_states, values_before
from actors.reward import statistics_of
from actors.reward_function import find_reward_function, judge_all
from orchestrator.batch import Batch, Examples, Loss, PolicyOutput, Rollout
from orchestrator.config import Model, Optimizer
from orchestrator.work import Work

REWARD = "reward"  # the name of its adapter


class BackboneModel(PolicyModel):
    """A policy with a value head, and a score head behind another adapter; either may be missing."""

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool) -> None:
        super().__init__(model, gradient_checkpointing)
        self.value: ScalarHead | None = None
        self.score: ScalarHead | None = None

    def add_value_head(self) -> None:
        """Says 0 everywhere at first, as a critic that starts from a causal model does."""
        self.value = self._head(torch.zeros)

    def add_reward(self, folder: Path) -> None:
        """From the PEFT folder that a reward_model stage left beside its model."""
        add_trained(self, folder, REWARD)
        self.score = self._head(torch.empty)
        with torch.no_grad():
            self.score.weight.copy_(load_file(folder / WEIGHTS)["base_model.model.score.weight"])
        self.score.requires_grad_(False)

    def _head(self, fill: Any) -> ScalarHead:
        hidden = self.model.config.get_text_config().hidden_size
        layer = nn.Linear(hidden, 1, bias=False, dtype=self.model.dtype)
        layer.weight.data = fill(1, hidden, dtype=self.model.dtype)
        return ScalarHead(layer)

    def forward(  # noqa: PLR0913, PLR0917 - DeepSpeed's engine takes plain tensors, by place
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        distribution: bool = False,
        positions: Tensor | None = None,
        asked: str = "policy",
    ) -> Any:
        """``asked``: policy, as ``PolicyModel`` answers; values, [B, T]; both, that and then values; scores,
        [B]; reference, as policy."""
        adapter = {"scores": REWARD, "reference": None}.get(asked, NAME)
        with using(self, adapter):
            states = self.hidden_states(tokens, attention_mask, positions)
        if asked == "scores":
            assert self.score is not None
            return self.score(last_states(states, attention_mask))
        values = None
        if asked in ("values", "both"):
            assert self.value is not None
            values = values_before(self.value, states, mask)
        if asked == "values":
            return values
        answer = self.answer(states, tokens, mask, temperature, entropy, distribution)
        return (*answer, values) if asked == "both" else answer


class Backbone(Actor):
    """The one worker of the four roles; as the actor it is called by the actor's verbs."""

    verbs: ClassVar[dict[str, Work]] = Actor.verbs | {
        "score_values": Work.SCORE,
        "score_reference": Work.SCORE,
        "reference_distributions": Work.SCORE,
        "score_rewards": Work.REWARD,
        "judge": Work.REWARD,
    }

    def __init__(  # noqa: PLR0913 - one line per fact, all by name
        self,
        *,
        model: Model,
        optimizer: Optimizer,
        total_steps: int,
        loss: LossFunction,
        value_loss: LossFunction | None,
        value_coef: float,
        head_rate: float | None,
        reward_adapter: str | None,
        reward_model: str | None,
        functions: Mapping[str, str],
        temperature: float = 1.0,
        entropy: bool = False,
        distribution: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        """``value_loss`` None: no critic. ``head_rate``: the value head's own peak learning rate.
        ``reward_adapter``: a PEFT folder on this base, None for functions only. ``reward_model``: the folder
        whose statistics normalise its scores, None: as they are."""
        joint = loss if value_loss is None else partial(joint_loss, loss, value_loss, value_coef)
        super().__init__(
            model=model, optimizer=optimizer, total_steps=total_steps, loss=joint, temperature=temperature,
            entropy=entropy, distribution=distribution, ema_decay=ema_decay,
        )  # fmt: skip
        self.has_critic, self.head_rate, self.reward_adapter = (
            value_loss is not None,
            head_rate,
            reward_adapter,
        )
        self.reward_model, self.functions = reward_model, functions

    def load_model(self) -> BackboneModel:
        return BackboneModel.load(self.model)

    def start(self) -> None:
        model = self.load_model()
        assert self.model.adapter is not None  # config refuses it
        adapt(model, self.model.adapter, total_steps=self.total_steps)
        if self.reward_adapter is not None:
            model.add_reward(Path(self.reward_adapter))
        if self.has_critic:
            model.add_value_head()
        self.mean, self.std = (0.0, 1.0) if self.reward_model is None else statistics_of(self.reward_model)
        self._functions = {name: find_reward_function(spec) for name, spec in self.functions.items()}
        self.backend = Backend(
            model, self.optimizer, total_steps=self.total_steps, ema_decay=self.ema_decay,
            head_rate=self.head_rate,
        )  # fmt: skip

    def output(self, part: Any, weights: Tensor) -> Any:
        """What the policy says, and with a critic also the values [b, T]."""
        if not self.has_critic:
            return super().output(part, weights)
        found = self._ask(part, "both", self.entropy, self.distribution)
        return PolicyOutput(logprobs=found[0], entropy=found[1], distribution=found[2]), found[3]

    def score_values(self, batch: Batch, micro_batches: MicroBatches) -> Tensor:
        """[n, T] values of this rank's rows."""
        return self.each(batch, micro_batches, lambda part: self._ask(part, "values"))

    def score_reference(self, batch: Batch | Examples, micro_batches: MicroBatches) -> Tensor:
        """[n, T] log-probs of the base."""
        return self.each(batch, micro_batches, lambda part: self._ask(part, "reference")[0])

    def reference_distributions(self, batch: Batch, micro_batches: MicroBatches) -> Tensor:
        """[n, T, V] log-probs of the base over the vocabulary, 0.0 off the action mask."""
        return self.each(batch, micro_batches, lambda p: self._ask(p, "reference", distribution=True)[2])

    def score_rewards(self, examples: Examples, micro_batches: MicroBatches) -> Tensor:
        """[n] scores of whole sequences."""
        scores = self.each(examples, micro_batches, lambda part: self._ask(part, "scores"))
        return (scores - self.mean) / self.std

    def judge(self, rollouts: list[Rollout]) -> dict[str, list[float]]:
        """By name, what each reward function says of each rollout."""
        return {name: judge_all(function, rollouts) for name, function in self._functions.items()}

    def _ask(self, part: Any, asked: str, entropy: bool = False, distribution: bool = False) -> Any:
        return self.backend.forward(
            part.tokens, part.attention_mask, part.action_mask, self.temperature, entropy, distribution,
            None, asked,
        )  # fmt: skip


def joint_loss(
    policy_loss: LossFunction, value_loss: LossFunction, value_coef: float, outputs: Any, part: Any
) -> Loss:
    """Both losses of one pass; each role's figures under its name."""
    policy, value = policy_loss(outputs[0], part), value_loss(outputs[1], part)
    metrics = {"actor/loss": policy.values.detach(), "critic/loss": value.values.detach()}
    metrics |= {f"actor/{name}": metric for name, metric in policy.metrics.items()}
    metrics |= {f"critic/{name}": metric for name, metric in value.metrics.items()}
    return Loss(values=policy.values + value_coef * value.values, metrics=metrics)
