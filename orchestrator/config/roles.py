"""What each role and the engines occupy, where they sit, and how long they may take."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt

from orchestrator.config.adapter import Adapter
from orchestrator.config.autoscale import Autoscale
from orchestrator.config.model import Optimizer
from orchestrator.settings import Fraction, RoleName, Settings

MODEL = "model"  # the name of the reward model among several rewards


class Workers(Settings):
    """What one role occupies."""

    gpus: NonNegativeInt = 0
    """GPUs, one worker each; 0 puts the role on CPUs."""
    workers: PositiveInt = 1
    """Workers when gpus is 0: data-parallel ranks on CPUs."""
    cpus_per_worker: PositiveFloat = 1
    """CPUs reserved per worker."""
    threads: PositiveInt = 1
    """Compute threads per worker on CPUs. Threads beyond the free cores make everything slower."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens of a forward or backward pass, padding included; on CPUs fewer where that saves padding."""

    @property
    def num_workers(self) -> int:
        return self.gpus or self.workers


class TrainedRole(Workers):
    model: str | None = None
    """Weights to start from; default: the last stage's (actor), the reward model's (critic)."""
    optimizer: Optimizer = Optimizer()
    """Optimizer of this role in the rl stage."""
    adapter: Adapter | None = None
    """Trained instead of the weights in the rl stage; default: model.adapter."""


class CriticRole(TrainedRole):
    start_from: Literal["auto", "reward", "actor"] = "auto"
    """Weights to start from when `model` is not given: the reward model's or the actor's (with a head that
    says 0); auto: the reward model's where there is one (arXiv:2203.02155)."""


class RewardFunction(Settings):
    """One of several rewards."""

    function: str | None = None
    """A file in actors/rewards/, or package.module:name; default: the file of the reward's own name."""
    weight: FiniteFloat = 1.0
    """Of this reward in the sum; 0: only logged."""


class RewardRole(Workers):
    model: str | None = None
    """Reward model folder or Hub id; default: what the reward_model stage trained."""
    normalize: bool = False
    """Subtract the mean and divide by the standard deviation that the reward_model stage left with the
    model."""
    function: str | None = None
    """A reward function instead of a model: a file in actors/rewards/, or package.module:name."""
    functions: dict[str, RewardFunction] = Field(default_factory=dict)
    """Several reward functions by name, beside the model where there is one: {exact_match: {weight: 0.5}}.
    The reward is the weighted sum, each is logged as reward/NAME."""
    model_weight: FiniteFloat | None = 1.0
    """Weight of the model beside `functions`; 0: only logged; null: no model is started."""

    def weights(self, *, stage: bool) -> dict[str, float]:
        """Weight of each reward by name, the model's under "model"; ``stage``: whether a reward_model stage
        trains one."""
        if self.function is not None:
            return {self.function: 1.0}
        model = {} if self.model_weight is None or not (self.model or stage) else {MODEL: self.model_weight}
        if not self.functions:
            return dict.fromkeys(model, 1.0)
        return model | {name: reward.weight for name, reward in self.functions.items()}

    def specs(self) -> dict[str, str]:
        """Where the function of each reward is, by name."""
        if self.function is not None:
            return {self.function: self.function}
        return {name: reward.function or name for name, reward in self.functions.items()}


class ReferenceRole(Workers):
    model: str | None = None
    """Frozen policy that the KL is measured from; default: the actor's initial weights."""


class RoleTable(Settings):
    actor: TrainedRole = TrainedRole()
    """The policy; also the workers of the sft stage."""
    critic: CriticRole | None = CriticRole()
    """State values, for algorithms with a critic; null refuses those."""
    reward: RewardRole = RewardRole()
    """The judge of finished responses; also the workers of the reward_model stage."""
    reference: ReferenceRole | None = ReferenceRole()
    """The frozen policy, for algorithms with a KL to it; null refuses those."""


class EngineConfig(Settings):
    """The vLLM rollout engines."""

    replicas: PositiveInt = 1
    """Engines; prompts go to the one with the least work."""
    autoscale: Autoscale | None = None
    """Moves their number while the run works, from `replicas` on: {max: 8, target_wait: 0.1}."""
    tensor_parallel: PositiveInt = 1
    """Workers per engine, which share each layer."""
    gpus: NonNegativeInt = 0
    """GPUs over all engines: replicas x tensor_parallel, or 0 for CPU engines."""
    cpus_per_worker: PositiveFloat = 1
    """CPUs reserved per engine worker."""
    threads: PositiveInt = 1
    """Compute threads per worker on CPUs."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Numbers of the engine; default: model.dtype."""
    kv_cache_mb: PositiveInt | None = None
    """KV cache per worker in MiB; default: 256 on CPUs, gpu_memory_fraction on GPUs."""
    gpu_memory_fraction: Fraction = 0.8
    """Share of a GPU that vLLM may take when kv_cache_mb is not set."""
    max_num_seqs: PositiveInt = 256
    """Sequences decoded at once."""
    eager: bool | None = None
    """Skip compilation (and graph capture on GPUs); default: true on CPUs, where compiling takes a minute at
    the start and then halves the time per token of small models, false on GPUs."""
    receive: Literal["weights", "adapter"] = "weights"
    """What travels to the engines when the actor trains an adapter: whole weights, merged on the sending
    side; or A and B only, which vLLM serves as LoRA (lora only; no compilation on CPUs)."""
    bucket_mb: PositiveInt = 64
    """Weights travel in buckets of this size."""


class Placement(Settings):
    share: tuple[tuple[RoleName, ...], ...] = ()
    """Groups of roles that live on the same devices, e.g. [[actor, reference], [critic, reward]]."""
    take_turns: bool = False
    """Roles that share devices with the engine sleep in the host's memory while it samples, and it while they
    work: each can then fill the devices (engine.gpu_memory_fraction). Needs rl.staleness 0."""
    backbone: Literal["separate", "shared"] = "separate"
    """A model for each role; or one frozen base in the actor's workers that serves actor, critic, reward and
    reference through adapters and heads."""
    value_coef: PositiveFloat = 0.1
    """On a shared backbone: what the critic's loss weighs beside the policy's."""
    timeout_s: PositiveFloat = 300
    """How long to wait for the cluster to grant the devices before saying what is missing."""


class Deadlines(Settings):
    """No call waits longer; the error names role, rank and verb."""

    start_s: PositiveFloat = 600
    """Loading a model into a role."""
    call_s: PositiveFloat = 1800
    """One score, update, save or generate call, with its wait behind the update before."""
    sync_s: PositiveFloat = 300
    """One weight sync."""
    stall_s: PositiveFloat = 120
    """A collective, or a call in which its worker makes no progress; the stacks of all workers are then
    written to stacks/ in the run directory and the worker is ended."""
    silence_s: PositiveFloat = 10
    """A worker that gives no sign of life for so long is ended and counts as dead."""


class Recovery(Settings):
    """What happens when a process dies."""

    restarts: NonNegativeInt = 3
    """Of each engine, reward or reference worker and of the trainers, within an hour; after the last the run
    writes a checkpoint, where its trainers live, and ends with status 75."""
