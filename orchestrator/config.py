"""The run tree: every knob of Quartet, documented under its field (``quartet train --help`` prints it).

Invariant: this module and all it imports load without torch, so a wrong setting is answered in a fraction of
a second. Load order is in ``configfile.py``: defaults, then one YAML file, then ``a.b.c=value``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

from orchestrator import plugins
from orchestrator.algorithms._base import AlgorithmConfig
from orchestrator.settings import Aggregate, Settings

Fraction = Annotated[float, Field(ge=0, le=1)]
RoleName = Literal["actor", "critic", "reward", "reference", "engine"]


class Model(Settings):
    path: str = ""
    """Hub id or local folder of the base model; or `task` to make a small one from scratch with the run's
    task."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) to pin."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Numbers of forward and backward; optimizer state and master weights are always float32."""
    max_length: PositiveInt = 1024
    """Longest sequence in tokens, prompt and response together."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention implementation of Transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about 30 % slower, much less memory."""


class Task(Settings):
    """A small verifiable task that makes its own data, tokenizer and model: nothing is downloaded."""

    name: str = "addition"
    """A file in launch/tasks/."""
    seed: int = 0
    """Seeds the data, the split and the initial weights."""
    num_train: PositiveInt = 4000
    """Rows of the training split."""
    num_heldout: PositiveInt = 500
    """Rows of the held-out split; no row is in both."""
    wrong_fraction: Fraction = 0.0
    """Share of the SFT rows whose answer is wrong on purpose, so that SFT ends mediocre."""


class PromptData(Settings):
    path: str = ""
    """JSON, JSONL, Parquet or CSV file, or a Hub data set id."""
    split: str = "train"
    """Split of a Hub data set."""
    prompt_key: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages."""
    label_key: str | None = None
    """Column with the reference answer for reward functions."""
    chat_template: bool = False
    """Wrap a prompt in the tokenizer's chat template (message lists always are)."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    too_long: Literal["error", "drop"] = "error"
    """A prompt that leaves no room for max_new_tokens: refuse the run (naming the row), or drop and count
    it."""


class ChatData(Settings):
    path: str = ""
    """JSON, JSONL, Parquet or CSV file, or a Hub data set id."""
    split: str = "train"
    """Split of a Hub data set."""
    prompt_key: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages."""
    response_key: str = "response"
    """Column with the response (for pairs, the better one)."""
    rejected_key: str = "rejected"
    """Column with the worse response; only preference data has one."""
    input_key: str | None = None
    """Column appended to the prompt where it is not empty (Alpaca's `input`)."""
    chat_template: bool = False
    """Wrap prompt and response in the tokenizer's chat template."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    too_long: Literal["error", "drop"] = "error"
    """A row longer than model.max_length: refuse the run (naming the row), or drop and count it."""


class Optimizer(Settings):
    """AdamW under DeepSpeed."""

    learning_rate: NonNegativeFloat = 1e-6
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine end at 0 on the last step of the stage."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: what is sharded over the ranks (1 optimizer state, 2 + gradients, 3 + parameters)."""


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
    """Token budget of one forward or backward pass, padding included."""

    @property
    def num_workers(self) -> int:
        return self.gpus or self.workers


class TrainedRole(Workers):
    model: str | None = None
    """Weights to start from; default: the last stage's (actor), the reward model's (critic)."""
    optimizer: Optimizer = Optimizer()
    """Optimizer of this role in the rl stage."""


class RewardRole(Workers):
    model: str | None = None
    """Reward model folder or Hub id; default: what the reward_model stage trained."""
    function: str | None = None
    """A reward function instead of a model: a file in actors/rewards/, or package.module:name."""


class ReferenceRole(Workers):
    model: str | None = None
    """Frozen policy that the KL is measured from; default: the actor's initial weights."""


class RoleTable(Settings):
    actor: TrainedRole = TrainedRole()
    """The policy; also the workers of the sft stage."""
    critic: TrainedRole = TrainedRole()
    """State values for PPO."""
    reward: RewardRole = RewardRole()
    """The judge of finished responses; also the workers of the reward_model stage."""
    reference: ReferenceRole = ReferenceRole()
    """The frozen policy."""


class EngineConfig(Settings):
    """The vLLM rollout engines."""

    replicas: PositiveInt = 1
    """Engines; prompts go to the one with the least work."""
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
    bucket_mb: PositiveInt = 64
    """Weights travel in buckets of this size."""


class Placement(Settings):
    share: tuple[tuple[RoleName, ...], ...] = ()
    """Groups of roles that live on the same devices, e.g. [[actor, reference], [critic, reward]]."""
    timeout_s: PositiveFloat = 300
    """How long to wait for the cluster to grant the devices before saying what is missing."""


class Deadlines(Settings):
    """No call waits longer; the error names role, rank and verb."""

    start_s: PositiveFloat = 600
    """Loading a model into a role."""
    call_s: PositiveFloat = 1800
    """One score, update, save or generate call."""
    sync_s: PositiveFloat = 300
    """One weight sync."""


class Sft(Settings):
    """Supervised fine-tuning on prompt and response."""

    data: ChatData = ChatData()
    """Training rows; filled in by the task when the run has one."""
    epochs: PositiveFloat = 1
    """Passes over the data; a fraction stops inside one."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    """Optimizer of this stage."""


class RewardModel(Settings):
    """A reward model from preference pairs (Bradley-Terry)."""

    data: ChatData = ChatData()
    """Training pairs; filled in by the task when the run has one."""
    heldout: ChatData | None = None
    """Pairs for the held-out accuracy; default: the last heldout_fraction of data."""
    heldout_fraction: Fraction = 0.1
    """Share of data held out when heldout is not given."""
    epochs: PositiveFloat = 1
    """Passes over the data; a fraction stops inside one."""
    batch_size: PositiveInt = 32
    """Pairs per optimizer step."""
    model: str | None = None
    """Weights to start from; default: the last stage's."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    """Optimizer of this stage."""


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
    aggregate: Aggregate = "token_mean"
    """What a token weighs: token_mean, sequence_mean, or constant_length (max_new_tokens)."""


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
    staleness: NonNegativeInt = 0
    """Updates that a rollout may be behind; 0 is the synchronous algorithm."""
    evaluation: Evaluation | None = None
    """Held-out evaluation; default: none, unless the run has a task."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only after the last step."""
    keep_checkpoints: PositiveInt = 2
    """Older checkpoints are deleted after a newer one is complete."""
    samples_every: NonNegativeInt = 10
    """Steps between sample texts in samples.jsonl; 0: none."""


class Tracking(Settings):
    """metrics.jsonl is always written; the rest is beside it and can fail without stopping the run."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases."""
    wandb_project: str = "quartet"
    """Project in wandb."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run directory."""


class Run(Settings):
    """One run: the stages that are present happen in the order sft, reward_model, rl; each starts from the
    last."""

    name: str = "run"
    """Name of the run."""
    run_dir: Path = Path("runs/run")
    """Everything the run writes goes here."""
    seed: int = 0
    """Seeds data order, weights of new heads and every sample."""
    ray_address: str | None = None
    """A running cluster ("auto" or host:port); default: RAY_ADDRESS, or a Ray of our own on this machine."""
    task: Task | None = None
    """A built-in task that provides model and data."""
    model: Model = Model()
    """The base model."""
    sft: Sft | None = None
    """Supervised fine-tuning stage."""
    reward_model: RewardModel | None = None
    """Reward model stage."""
    rl: RL | None = None
    """Reinforcement learning stage."""
    roles: RoleTable = RoleTable()
    """Devices and weights of each role."""
    engine: EngineConfig = EngineConfig()
    """The rollout engines."""
    placement: Placement = Placement()
    """Which roles share devices."""
    deadlines: Deadlines = Deadlines()
    """Longest waits."""
    tracking: Tracking = Tracking()
    """Where metrics go."""

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        if not (self.sft or self.reward_model or self.rl):
            raise ValueError("no stage: give at least one of sft, reward_model, rl")
        if not self.model.path and self.task is None:
            raise ValueError("model.path is empty: give a Hub id or a local folder")
        _check_engine(self.engine)
        _check_share(self.placement, self.roles, self.engine)
        if self.rl is not None:
            _check_rl(self, self.rl)
        return self


def algorithm(value: Any) -> Any:
    """{"name": "ppo", **settings} -> the settings class of orchestrator/algorithms/ppo.py, filled."""
    if not isinstance(value, dict):
        return value
    settings = dict(value)
    name = settings.pop("name", "ppo")
    return plugins.find("orchestrator.algorithms", name).CONFIG(**settings)


def _check_engine(engine: EngineConfig) -> None:
    workers = engine.replicas * engine.tensor_parallel
    if engine.gpus not in (0, workers):
        raise ValueError(
            f"engine.gpus={engine.gpus} but engine.replicas={engine.replicas} x engine.tensor_parallel="
            f"{engine.tensor_parallel} = {workers}; set engine.gpus={workers}, or 0 for CPU engines"
        )


def _check_share(placement: Placement, roles: RoleTable, engine: EngineConfig) -> None:
    seen: set[str] = set()
    for group in placement.share:
        for role in group:
            if role in seen:
                raise ValueError(f"placement.share names {role!r} twice; a role lives in one place")
            seen.add(role)
        on_gpu = {
            role: (engine.gpus if role == "engine" else getattr(roles, role).gpus) > 0 for role in group
        }
        if len(set(on_gpu.values())) > 1:
            raise ValueError(
                f"placement.share={list(group)} mixes roles on GPUs and on CPUs {on_gpu}; "
                "give all of them gpus, or none"
            )


def _check_rl(run: Run, rl: RL) -> None:
    batch = rl.prompts_per_step * rl.samples_per_prompt
    if batch % rl.updates.minibatches:
        raise ValueError(
            f"rl.updates.minibatches={rl.updates.minibatches} does not divide rl.prompts_per_step="
            f"{rl.prompts_per_step} x rl.samples_per_prompt={rl.samples_per_prompt} = {batch}; "
            f"pick a divisor of {batch}"
        )
    if rl.sampling.max_new_tokens >= run.model.max_length:
        raise ValueError(
            f"rl.sampling.max_new_tokens={rl.sampling.max_new_tokens} leaves no room for a prompt in "
            f"model.max_length={run.model.max_length}; lower the first or raise the second"
        )
    reward = run.roles.reward
    if reward.model and reward.function:
        raise ValueError(
            f"roles.reward.model={reward.model!r} and roles.reward.function={reward.function!r} are both "
            "set; keep one"
        )
    if not (reward.model or reward.function or run.reward_model):
        raise ValueError(
            "nothing gives rewards: set roles.reward.model, roles.reward.function, or add a "
            "reward_model stage"
        )
    if rl.algorithm.compares_siblings and rl.samples_per_prompt < 2:
        raise ValueError(
            f"rl.samples_per_prompt={rl.samples_per_prompt}: {type(rl.algorithm).__name__} compares the "
            "samples of one prompt and learns nothing from one; use 2 or more"
        )
