"""Whether what a run wants to train is there: adapters and frozen weights tried on a model without memory."""

import importlib.util
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from actors.adapter import adapt, base_of, freeze
from actors.model import LanguageModel, PolicyModel
from orchestrator.config import Adapter, Run

PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flex_attention": ("torch", "torch"),  # which has no backward pass of it for CPUs
    "liger": ("liger_kernel", "liger-kernel"),
}


def check_trainable(run: Run) -> None:
    """ValueError for layers or weights that the base model does not have, and for what cannot run here."""
    if run.model.attention in PACKAGES:
        _check_kernels(run, f"model.attention={run.model.attention}", run.model.attention, "sdpa")
    if run.model.liger:
        _check_kernels(run, "model.liger=true", "liger", "false")
    if run.rl is not None and run.placement.backbone == "shared" and run.roles.reward.model:
        reward_adapter(run.roles.reward.model, run.roles.actor.model or run.model.path)
    adapters = {field: adapter for field, (adapter, *_) in run.trained.items() if adapter is not None}
    if not adapters and not run.model.freeze:
        return
    for field, adapter in adapters.items():
        _check_quantize(run, field, adapter)
        if adapter.kind == "prefix" and run.model.gradient_checkpointing:
            raise ValueError(
                f"{field}.kind=prefix with model.gradient_checkpointing: Transformers drops the prefix's "
                "keys and values there; switch one of them off, or use prompt"
            )
        adapt(skeleton(run), adapter, total_steps=100)
    if run.model.freeze:
        freeze(skeleton(run), run.model.freeze)


def reward_adapter(path: str, base: str) -> str:
    """The PEFT folder beside a reward model's. ValueError where there is none, or one on another base."""
    folder = Path(f"{path}_adapter")
    if not (folder / "adapter_config.json").exists():
        raise ValueError(
            f"placement.backbone=shared: the reward model {path} has no adapter beside it ({folder}); train "
            "it with reward_model.adapter, or use placement.backbone=separate"
        )
    if Path(base_of(folder)).absolute() != Path(base).absolute():
        raise ValueError(
            f"placement.backbone=shared: {folder} is an adapter on {base_of(folder)}, the actor is {base}; "
            "train the reward model on the actor's base, or use placement.backbone=separate"
        )
    return str(folder)


def _check_quantize(run: Run, field: str, adapter: Adapter) -> None:
    """bitsandbytes 0.50 packs 4-bit weights anew in a CPU's first forward pass without gradients, after which
    what it dequantizes is another matrix: seen, with merged weights 6 nats off."""
    if adapter.quantize is None:
        return
    stage = field.split(".")[0]
    name = field.split(".")[1] if stage == "roles" else "reward" if stage == "reward_model" else "actor"
    if not getattr(run.roles, name).gpus:
        raise ValueError(
            f"{field}.quantize={adapter.quantize} on CPUs: bitsandbytes changes the layout of 4-bit weights "
            f"there as it reads them, and they merge wrongly; set roles.{name}.gpus, or leave quantize out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{field}.quantize={adapter.quantize} needs bitsandbytes, which is not installed here; "
            "`pip install bitsandbytes`, or leave quantize out: lora on the whole base"
        )


def _check_kernels(run: Run, setting: str, kernels: str, instead: str) -> None:
    module, package = PACKAGES[kernels]
    if not run.roles.actor.gpus:
        raise ValueError(f"{setting} runs on GPUs only; set roles.actor.gpus, or use {instead}")
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"{setting} needs {package}, which is not installed here; `pip install {package}`, or use "
            f"{instead}"
        )


def skeleton(run: Run, path: str | None = None) -> LanguageModel:
    """A model's modules and names, the base's unless another is given, on ``meta``."""
    config = AutoConfig.from_pretrained(path or run.model.path, revision=None if path else run.model.revision)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return PolicyModel(model, gradient_checkpointing=False)
