"""The base model and how it is optimised."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from orchestrator.config.adapter import Adapter
from orchestrator.settings import Fraction, Settings


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
    """Attention implementation of Transformers. With flash attention (GPUs, package flash-attn) and flex
    attention (GPUs) the rows of a micro-batch lie behind one another and nothing is computed for padding.
    With sdpa nothing but attention is, and what neighbouring rows begin with alike is computed once."""
    liger: bool = False
    """Liger's kernels for norms, rotary positions and MLPs (GPUs, package liger-kernel)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about 30 % slower, much less memory."""
    adapter: Adapter | None = None
    """Trained instead of the weights, in every stage and role that does not say otherwise; null: all the
    weights are trained."""
    freeze: tuple[str, ...] = ()
    """Weights that are not trained, by patterns of their names, e.g. ["*embed*", "model.layers.[0-9].*"]."""

    def training(self, own: Adapter | None) -> Model:
        """For a learner whose stage or role asks for the adapter ``own``; None: for this model's."""
        adapter = own or self.adapter
        return self.model_copy(update={"adapter": None if adapter and adapter.kind == "none" else adapter})

    def frozen(self) -> Model:
        """For a role that is not trained."""
        return self.model_copy(update={"adapter": None, "freeze": ()})


class Optimizer(Settings):
    """Under DeepSpeed; the same step at every ZeRO stage and number of ranks."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices between embedding and head, and adamw for the rest."""
    learning_rate: NonNegativeFloat = 1e-6
    """Peak learning rate."""
    adam_learning_rate: NonNegativeFloat | None = None
    """Under muon, the peak for what adamw steps; default: learning_rate."""
    momentum: Fraction = 0.95
    """Muon's Nesterov momentum."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine fall to 0, which the step after the last would have.
    Counted in steps taken: a skipped one, or the actor's during rl.critic_warmup, moves nothing."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: what is sharded over the ranks (1 optimizer state, 2 + gradients, 3 + parameters). On
    one rank float32 always runs at 0; bfloat16 runs at 2 or 3, the stages that add up in float32."""

    @model_validator(mode="after")
    def _belongs_together(self) -> Optimizer:
        if self.adam_learning_rate is not None and self.name != "muon":
            raise ValueError(
                f"adam_learning_rate={self.adam_learning_rate} is for name=muon; "
                "adamw has one rate, learning_rate"
            )
        return self
