"""What a shared backbone cannot carry: one base, the actor's adapter, the reward's, and heads."""

from __future__ import annotations

from orchestrator.config.model import Model
from orchestrator.config.rl import RL
from orchestrator.config.roles import MODEL, RoleTable
from orchestrator.config.trained import Supervised

SHARED = "placement.backbone=shared"
KINDS = ("lora", "dora")
SEPARATE = "use placement.backbone=separate"


def check_backbone(model: Model, roles: RoleTable, stages: Supervised, rl: RL) -> None:
    """ValueError for roles that want another base, or another way to train."""
    adapter = model.training(roles.actor.adapter).adapter
    if adapter is None or adapter.kind not in KINDS or adapter.quantize:
        kind = "none" if adapter is None else adapter.quantize or adapter.kind
        raise ValueError(
            f"{SHARED} with roles.actor.adapter.kind={kind}: the base must stay as it is for the other "
            f"roles; use lora or dora, or {SEPARATE}"
        )
    if rl.critic_warmup:
        raise ValueError(
            f"{SHARED} with rl.critic_warmup={rl.critic_warmup}: actor and critic step together there; "
            f"set it to 0, or {SEPARATE}"
        )
    own = {"critic": roles.critic, "reference": roles.reference}
    for name, role in own.items():
        if role is not None and role.model:
            raise ValueError(
                f"{SHARED} with roles.{name}.model={role.model!r}, which is another base; leave it out, or "
                f"{SEPARATE}"
            )
    if roles.critic is not None and (roles.critic.adapter or roles.critic.start_from == "reward"):
        setting = "adapter" if roles.critic.adapter else "start_from=reward"
        raise ValueError(
            f"{SHARED} with roles.critic.{setting}: the critic is a head on the actor's adapter; leave it "
            f"out, or {SEPARATE}"
        )
    if MODEL in roles.reward.weights(stage="reward_model" in stages):
        _check_reward(model, stages)


def _check_reward(model: Model, stages: Supervised) -> None:
    stage = stages.get("reward_model")
    if stage is None:
        return
    adapter = model.training(stage.adapter).adapter
    if adapter is None or adapter.kind not in KINDS or adapter.quantize:
        kind = "none" if adapter is None else adapter.quantize or adapter.kind
        raise ValueError(
            f"{SHARED} with reward_model.adapter.kind={kind}: the reward must be an adapter on the same "
            f"base; use lora or dora there, or {SEPARATE}"
        )
    if "preference" in stages:
        raise ValueError(
            f"{SHARED} with reward_model and preference in one run: the reward model is trained on what the "
            "actor was before the preference stage; leave one of the stages out"
        )
