"""Which adapters a stage, a role or the engine cannot carry, said before any device is claimed."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.config.adapter import PROMPT_KINDS, Adapter
from orchestrator.config.model import Model
from orchestrator.config.rl import RL
from orchestrator.config.roles import EngineConfig, RoleTable
from orchestrator.config.stages import Preference, RewardModel, Sft

MAX_SERVED_RANK = 512  # vLLM's largest max_lora_rank
Supervised = Mapping[str, Sft | RewardModel | Preference]  # the stages a run has, by name, in their order
Trained = dict[str, tuple[Adapter | None, int, int]]


def trained_with(model: Model, roles: RoleTable, stages: Supervised, rl: RL | None) -> Trained:
    """Of each stage or role under training, by the field that says it: its adapter, its ZeRO stage, and its
    workers."""
    found: Trained = {}
    for name, stage in stages.items():
        place = roles.reward if name == "reward_model" else roles.actor
        adapter = model.training(stage.adapter).adapter
        found[f"{name}.adapter"] = (adapter, stage.optimizer.zero_stage, place.num_workers)
    if rl is not None:
        learners = {
            "actor": roles.actor,
            "critic": roles.critic if "critic" in rl.algorithm.roles() else None,
        }
        for name, role in learners.items():
            if role is not None:
                adapter = model.training(role.adapter).adapter
                found[f"roles.{name}.adapter"] = (adapter, role.optimizer.zero_stage, role.num_workers)
    return found


def check_adapters(
    model: Model, roles: RoleTable, stages: Supervised, rl: RL | None, engine: EngineConfig
) -> None:
    """ValueError for what a stage, a role or the engine cannot carry."""
    for field, (adapter, zero_stage, num_workers) in trained_with(model, roles, stages, rl).items():
        if model.freeze and adapter is not None:
            raise ValueError(
                f"model.freeze={list(model.freeze)} and {field}.kind={adapter.kind} are both set; an "
                "adapter freezes all the weights: keep one of them"
            )
        if adapter is not None:
            _check_sharding(model, field, adapter, zero_stage=zero_stage, num_workers=num_workers)
    _check_stages(model, stages, rl)
    if rl is not None:
        _check_engine(model.training(roles.actor.adapter).adapter, engine)


def _check_sharding(model: Model, field: str, adapter: Adapter, *, zero_stage: int, num_workers: int) -> None:
    sharded = zero_stage == 3 and num_workers > 1
    if sharded and (adapter.kind in ("dora", *PROMPT_KINDS) or adapter.quantize):
        what = f"quantize={adapter.quantize}" if adapter.quantize else f"kind={adapter.kind}"
        raise ValueError(
            f"{field}.{what} reads weights outside of the layers that ZeRO stage 3 gathers them for; set "
            "optimizer.zero_stage to 2 or less, or use lora"
        )
    whole = model.dtype == "float32" and (zero_stage == 0 or num_workers == 1)
    if adapter.kind == "adalora" and not whole:
        raise ValueError(
            f"{field}.kind=adalora weighs ranks by whole gradients, which ZeRO stage {zero_stage} in "
            f"{model.dtype} on {num_workers} worker(s) does not keep; use model.dtype=float32 and "
            "optimizer.zero_stage=0, or use lora"
        )


def _check_stages(model: Model, stages: Supervised, rl: RL | None) -> None:
    """Prefix, prompt and p_tuning cannot be merged, so what they trained only PEFT loads."""
    order = [*stages, *(["rl"] if rl is not None else [])]
    for name, stage in stages.items():
        adapter = model.training(stage.adapter).adapter
        if adapter is None or adapter.merges:
            continue
        later = order[order.index(name) + 1 :]
        if name == "reward_model":
            later = [other for other in later if other == "rl"]
        if later:
            raise ValueError(
                f"{name}.adapter.kind={adapter.kind} cannot be merged into a model folder, which {later[0]} "
                f"would start from; use lora, dora or adalora in {name}, or make it the last stage"
            )
        if isinstance(stage, Sft) and stage.packing:
            raise ValueError(
                f"sft.packing with sft.adapter.kind={adapter.kind}: only the first row of a packed sequence "
                "would see the virtual tokens; use packing: false, or lora"
            )


def _check_engine(adapter: Adapter | None, engine: EngineConfig) -> None:
    if adapter is not None and not adapter.merges:
        raise ValueError(
            f"roles.actor.adapter.kind={adapter.kind} in the rl stage: neither vLLM nor the weight transfer "
            "carries virtual tokens, so samples would come from another policy; use lora, dora or adalora"
        )
    if engine.receive == "weights":
        return
    kind = "none" if adapter is None else adapter.kind
    if adapter is None or kind != "lora":
        raise ValueError(
            f"engine.receive=adapter with roles.actor.adapter.kind={kind}: vLLM serves plain LoRA only; use "
            "lora, or engine.receive=weights, which merges every kind on the sending side"
        )
    if adapter.rank > MAX_SERVED_RANK:
        raise ValueError(
            f"engine.receive=adapter with adapter.rank={adapter.rank}: vLLM serves ranks up to "
            f"{MAX_SERVED_RANK}; lower it, or use engine.receive=weights"
        )
