"""The reinforcement learning stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny

from orchestrator import plugins
from orchestrator.algorithms._base import AlgorithmConfig
from orchestrator.config.data import PromptData
from orchestrator.filters import GroupFilter
from orchestrator.settings import Aggregate, Settings
from orchestrator.shaping import Shaping


def algorithm(value: Any) -> Any:
    """{"name": "ppo", **settings} -> the settings class of orchestrator/algorithms/ppo.py, filled."""
    if not isinstance(value, dict):
        return value
    settings = dict(value)
    name = settings.pop("name", "ppo")
    return plugins.find("orchestrator.algorithms", name).CONFIG(**settings)


class SamplingConfig(Settings):
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer scores at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Below 1 the engine's log-probs are those of the cut distribution: expect a
    mismatch."""
    max_new_tokens: PositiveInt = 256
    """Longest response in tokens."""


class Updates(Settings):
    epochs: PositiveInt = 1
    """Passes over each batch of experience."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass; must divide prompts_per_step x samples_per_prompt."""
    aggregate: Aggregate | None = None
    """What a token weighs: token_mean, sequence_mean, or constant_length (max_new_tokens); default: the rule
    of the algorithm's paper."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Log-probs of the policy before the step: recompute them; take the engine's as they are (rollout: saves
    a forward pass, and its mismatch enters the ratio); or auto: recompute where the algorithm reads them."""


class Evaluation(Settings):
    prompts: PromptData = PromptData()
    """Held-out prompts; filled in by the task when the run has one."""
    function: str = "exact_match"
    """Judge of the greedy responses, apart from the reward: a file in actors/rewards/ or
    package.module:name."""
    every: NonNegativeInt = 0
    """Steps between evaluations; 0: only before the first step and after the last."""


class RL(Settings):
    """Reinforcement learning with a rollout engine."""

    algorithm: Annotated[SerializeAsAny[AlgorithmConfig], BeforeValidator(lambda value: algorithm(value))] = (
        Field(default_factory=lambda: algorithm({"name": "ppo"}))
    )
    """`name` of a file in orchestrator/algorithms/ and its own settings."""
    prompts: PromptData = PromptData()
    """Training prompts; filled in by the task when the run has one."""
    steps: PositiveInt = 100
    """Training steps: one batch of rollouts each."""
    prompts_per_step: PositiveInt = 32
    """Prompts per step."""
    samples_per_prompt: PositiveInt = 4
    """Responses per prompt: a group."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""
    updates: Updates = Updates()
    """How a batch of experience becomes optimizer steps."""
    shaping: Shaping = Shaping()
    """What happens to the rewards before the algorithm sees them."""
    filter: GroupFilter | None = None
    """Groups without signal are dropped and other prompts drawn instead; null: every group stays."""
    staleness: NonNegativeInt = 0
    """Updates that a rollout may be behind; 0 is the synchronous algorithm."""
    score_tokens: PositiveInt = 256
    """Response tokens that are scored together: as many neighbouring groups as stay below, at least one. Few
    hide more of the scoring behind generation; many start fewer forward passes, which pays for models of a
    few million parameters."""
    critic_warmup: NonNegativeInt = 0
    """First steps in which only the critic learns and the actor is frozen."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keeps an average of the actor's weights, decay x average + (1 - decay) x weights per optimizer step,
    and exports it as model_ema/; null: none."""
    evaluation: Evaluation | None = None
    """Held-out evaluation; default: none, unless the run has a task."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: PositiveInt = 2
    """How many of the last checkpoints stay; older ones are deleted after a newer one is on disk."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of every so many steps stay for good; 0: none do."""
    best_metric: str | None = None
    """The checkpoint with the highest value of this metric stays too: heldout_accuracy, or one of the step's
    such as reward; null: none does."""
    checkpoints_in_background: bool = False
    """The learners write their copy while the next step trains. A run that is killed may then lose the save
    under way, one more step than without; needs room for a second copy of the training state in memory."""
    samples_every: NonNegativeInt = 10
    """Steps between sample texts in samples.jsonl; 0: none."""
