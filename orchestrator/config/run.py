"""The whole run, and the rules that span several of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from orchestrator.config.autoscale import check_autoscale
from orchestrator.config.backbone import check_backbone
from orchestrator.config.data import Task
from orchestrator.config.evaluate import Evaluate
from orchestrator.config.model import Model
from orchestrator.config.rl import RL
from orchestrator.config.roles import (
    MODEL,
    Deadlines,
    EngineConfig,
    Placement,
    Recovery,
    RewardRole,
    RoleTable,
)
from orchestrator.config.stages import Preference, RewardModel, Sft
from orchestrator.config.trained import Trained, check_adapters, trained_with
from orchestrator.settings import Settings


class Tracking(Settings):
    """metrics.jsonl is always written; the rest is beside it and can fail without stopping the run."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases."""
    wandb_project: str = "quartet"
    """Project in wandb."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run directory."""
    trace: bool = True
    """Write trace.json into the run directory: what every worker did and when, for Perfetto, chrome://tracing
    and `quartet report`."""


class Run(Settings):
    """One run: the stages that are present happen in the order sft, reward_model, preference, rl; each
    starts from the last policy."""

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
    preference: Preference | None = None
    """Preference learning stage (DPO and its family)."""
    rl: RL | None = None
    """Reinforcement learning stage."""
    evaluate: Evaluate | None = None
    """What `quartet evaluate` measures; no stage of training."""
    roles: RoleTable = RoleTable()
    """Devices and weights of each role."""
    engine: EngineConfig = EngineConfig()
    """The rollout engines."""
    placement: Placement = Placement()
    """Which roles share devices."""
    deadlines: Deadlines = Deadlines()
    """Longest waits."""
    recovery: Recovery = Recovery()
    """What happens when a process dies."""
    tracking: Tracking = Tracking()
    """Where metrics go."""

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        if not (self.sft or self.reward_model or self.preference or self.rl or self.evaluate):
            raise ValueError("no stage: give at least one of sft, reward_model, preference, rl")
        if self.evaluate is not None:
            _check_evaluate(self, self.evaluate)
        if not self.model.path and self.task is None:
            raise ValueError("model.path is empty: give a Hub id or a local folder")
        _check_engine(self.engine)
        if self.engine.autoscale is not None:
            check_autoscale(self.engine.autoscale, replicas=self.engine.replicas, share=self.placement.share)
        _check_share(self.placement, self.roles, self.engine)
        if self.rl is not None:
            _check_rl(self, self.rl)
            _check_turns(self, self.rl)
        if self.preference is not None and self.preference.objective.needs_reference:
            _check_reference(self.roles, self.preference)
        check_adapters(self.model, self.roles, self.supervised, self.rl, self.engine)
        if self.rl is not None and self.placement.backbone == "shared":
            check_backbone(self.model, self.roles, self.supervised, self.rl)
            if self.placement.take_turns:
                raise ValueError(
                    "placement.take_turns with placement.backbone=shared: the actor's workers would have to "
                    "be awake for the other roles; switch one of them off"
                )
        return self

    @property
    def supervised(self) -> dict[str, Sft | RewardModel | Preference]:
        """The supervised stages of this run, by name, in their order."""
        named = {"sft": self.sft, "reward_model": self.reward_model, "preference": self.preference}
        return {name: stage for name, stage in named.items() if stage is not None}

    @property
    def trained(self) -> Trained:
        """With which adapter each stage and role trains, by field."""
        return trained_with(self.model, self.roles, self.supervised, self.rl)


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
        places = {role: engine if role == "engine" else getattr(roles, role) for role in group}
        on_gpu = {role: place.gpus > 0 for role, place in places.items() if place is not None}
        if len(set(on_gpu.values())) > 1:
            raise ValueError(
                f"placement.share={list(group)} mixes roles on GPUs and on CPUs {on_gpu}; "
                "give all of them gpus, or none"
            )


def _check_turns(run: Run, rl: RL) -> None:
    if not run.placement.take_turns:
        return
    together = next((group for group in run.placement.share if "engine" in group), ())
    if len(together) < 2:
        raise ValueError(
            f"placement.take_turns but placement.share={[list(group) for group in run.placement.share]} puts "
            "no role beside the engine; add a group like [engine, actor], or set placement.take_turns=false"
        )
    if rl.staleness:
        raise ValueError(
            f"placement.take_turns with rl.staleness={rl.staleness}: the engine would have to sample "
            "while it sleeps; set rl.staleness=0, or give the engine devices of its own"
        )
    for name, role in (("actor", run.roles.actor), ("critic", run.roles.critic)):
        if role is not None and name in together and role.optimizer.zero_stage == 3:
            raise ValueError(
                f"placement.take_turns with roles.{name}.optimizer.zero_stage=3: DeepSpeed moves the "
                "optimizer states of ZeRO-3 only for its own FusedAdam; set zero_stage to 2"
            )


def _check_reference(roles: RoleTable, preference: Preference) -> None:
    if roles.reference is None:
        raise ValueError(
            f"roles.reference=null switches off what preference.objective.name={preference.objective.name} "
            "is measured from; leave it out of the run, or take cpo, orpo or simpo"
        )


def _check_evaluate(run: Run, evaluate: Evaluate) -> None:
    if evaluate.heldout is None and evaluate.prompts is None:
        raise ValueError("evaluate measures nothing: give evaluate.heldout, evaluate.prompts, or both")
    if max(evaluate.pass_at, default=0) > evaluate.samples_per_prompt:
        raise ValueError(
            f"evaluate.pass_at={list(evaluate.pass_at)} needs {max(evaluate.pass_at)} answers to a prompt, "
            f"evaluate.samples_per_prompt={evaluate.samples_per_prompt}; raise the latter"
        )
    if evaluate.prompts is not None and evaluate.sampling.max_new_tokens >= run.model.max_length:
        raise ValueError(
            f"evaluate.sampling.max_new_tokens={evaluate.sampling.max_new_tokens} leaves no room for a "
            f"prompt in model.max_length={run.model.max_length}; lower the first or raise the second"
        )


def _check_rl(run: Run, rl: RL) -> None:
    batch = rl.prompts_per_step * rl.samples_per_prompt
    if rl.algorithm.steps_on_groups and rl.prompts_per_step % rl.updates.minibatches:
        raise ValueError(
            f"rl.updates.minibatches={rl.updates.minibatches} does not divide rl.prompts_per_step="
            f"{rl.prompts_per_step}, and {rl.algorithm.name} keeps the samples of a prompt together; pick a "
            f"divisor of {rl.prompts_per_step}"
        )
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
    if rl.best_metric == "heldout_accuracy" and not (
        run.task or (rl.evaluation and rl.evaluation.prompts.path)
    ):
        raise ValueError(
            "rl.best_metric=heldout_accuracy but nothing is held out; give rl.evaluation.prompts"
        )
    _check_reward(run.roles.reward, stage=run.reward_model is not None)
    _check_algorithm(run, rl)


def _check_reward(reward: RewardRole, *, stage: bool) -> None:
    if reward.function and (reward.model or reward.functions):
        other = f"model={reward.model!r}" if reward.model else f"functions={sorted(reward.functions)}"
        raise ValueError(
            f"roles.reward.{other} and roles.reward.function={reward.function!r} are both set; keep one, "
            "or put the function into roles.reward.functions"
        )
    if MODEL in reward.functions:
        raise ValueError(
            f"roles.reward.functions.{MODEL}: that name is the reward model's; give the function another"
        )
    weights = reward.weights(stage=stage)
    if not weights:
        raise ValueError(
            "nothing gives rewards: set roles.reward.model, roles.reward.function or roles.reward.functions, "
            "or add a reward_model stage"
        )
    if not any(weights.values()):
        raise ValueError(
            f"every reward has the weight 0 ({', '.join(weights)}): nothing would be learned; set one of "
            "roles.reward.functions.NAME.weight or roles.reward.model_weight"
        )


def _check_algorithm(run: Run, rl: RL) -> None:
    name, needed = rl.algorithm.name, rl.algorithm.roles()
    for role in sorted(needed):
        if getattr(run.roles, role) is None:
            raise ValueError(
                f"roles.{role}=null switches off what rl.algorithm.name={name} needs as configured; leave it "
                f"out of the run, or choose settings without {role}"
            )
    if rl.algorithm.compares_siblings and rl.samples_per_prompt < 2:
        raise ValueError(
            f"rl.samples_per_prompt={rl.samples_per_prompt}: {type(rl.algorithm).__name__} compares the "
            "samples of one prompt and learns nothing from one; use 2 or more"
        )
    if rl.updates.old_logprobs == "rollout" and rl.algorithm.correction.rule != "none":
        raise ValueError(
            f"rl.algorithm.correction.rule={rl.algorithm.correction.rule} compares the trainer's log-probs "
            "with the engine's, and rl.updates.old_logprobs=rollout takes the engine's for both; use auto"
        )
    _check_rewards_of(rl)
    if rl.critic_warmup and "critic" not in needed:
        raise ValueError(
            f"rl.critic_warmup={rl.critic_warmup} but {name} has no critic to warm up; set it to 0"
        )
    if rl.critic_warmup >= rl.steps:
        raise ValueError(
            f"rl.critic_warmup={rl.critic_warmup} leaves the actor none of rl.steps={rl.steps} "
            "steps; lower it"
        )
    critic = run.roles.critic
    if critic is None or "critic" not in needed or critic.start_from == "auto":
        return
    if critic.model:
        raise ValueError(
            f"roles.critic.model={critic.model!r} and roles.critic.start_from={critic.start_from} are both "
            "set; keep one"
        )
    if critic.start_from == "reward" and not (run.roles.reward.model or run.reward_model):
        raise ValueError(
            "roles.critic.start_from=reward but the run has no reward model; use actor, or give "
            "roles.reward.model or a reward_model stage"
        )


def _check_rewards_of(rl: RL) -> None:
    """Filter and shaping against the samples they are given."""
    if rl.filter is not None and rl.filter.flat and rl.samples_per_prompt < 2:
        raise ValueError(
            f"rl.filter.flat drops every group of rl.samples_per_prompt={rl.samples_per_prompt}; use 2 or "
            "more, or rl.filter.flat=false"
        )
    buffer, longest = rl.shaping.overlong_buffer, rl.sampling.max_new_tokens
    if buffer is not None and buffer >= longest:
        raise ValueError(
            f"rl.shaping.overlong_buffer={buffer} is all of rl.sampling.max_new_tokens={longest}: every "
            f"response would be punished; use less than {longest}"
        )
    if rl.algorithm.greedy_baseline and (rl.shaping.clip is not None or rl.shaping.normalize != "none"):
        raise ValueError(
            f"rl.shaping.clip and rl.shaping.normalize would put the rewards on another scale than "
            f"{rl.algorithm.name}'s greedy baseline; leave both out"
        )
