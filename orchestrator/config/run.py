"""The whole run, and the rules that span several of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from orchestrator.config.data import Task
from orchestrator.config.model import Model
from orchestrator.config.rl import RL
from orchestrator.config.roles import Deadlines, EngineConfig, Placement, RoleTable
from orchestrator.config.stages import RewardModel, Sft
from orchestrator.settings import Settings


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
