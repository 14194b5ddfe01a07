"""What is trained instead of all the weights.

merges          lora, dora, adalora          a plain model folder comes out; any stage
lives beside    prefix, prompt, p_tuning     stays a PEFT folder: nothing after it can load it
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from orchestrator.settings import Settings

PROMPT_KINDS = ("prefix", "prompt", "p_tuning")


class Adapter(Settings):
    """Trained through PEFT; the model's own weights stay as they are. Heads (value, score) train whole."""

    kind: Literal["lora", "dora", "adalora", "prefix", "prompt", "p_tuning", "none"] = "lora"
    """lora (arXiv:2106.09685), dora (2402.09353), adalora (2303.10512), prefix (2101.00190), prompt
    (2104.08691), p_tuning (2103.10385); none trains all the weights where model.adapter says otherwise."""
    rank: PositiveInt = 8
    """Of lora and dora; adalora's average rank at the end."""
    alpha: PositiveFloat = 16
    """The update is alpha / rank x B A."""
    target_modules: tuple[str, ...] = ()
    """Names, or ends of names, of the linear layers that get one, e.g. [q_proj, v_proj]; default: all of the
    backbone."""
    initial_rank: PositiveInt = 12
    """Rank of adalora at the start; it falls to `rank` over the middle of the stage's steps."""
    orthogonal_weight: PositiveFloat = 0.5
    """Of adalora's penalty on P and Q that are not orthogonal."""
    virtual_tokens: PositiveInt = 16
    """Of prefix, prompt and p_tuning: trained positions before each sequence."""
    quantize: Literal["nf4"] | None = None
    """QLoRA (arXiv:2305.14314): the frozen weights in 4 bits, through bitsandbytes. For lora."""

    @property
    def merges(self) -> bool:
        """Whether the result can be a plain model folder."""
        return self.kind not in PROMPT_KINDS

    @model_validator(mode="after")
    def _belongs_together(self) -> Adapter:
        if self.kind == "adalora" and self.initial_rank <= self.rank:
            raise ValueError(
                f"adapter.initial_rank={self.initial_rank} does not fall to adapter.rank={self.rank}; "
                "adalora starts higher than it ends: raise the first or lower the second"
            )
        if self.quantize and self.kind != "lora":
            raise ValueError(
                f"adapter.quantize={self.quantize} with adapter.kind={self.kind}; QLoRA is lora on a 4-bit "
                "base: use kind lora, or quantize: null"
            )
        if self.target_modules and not self.merges:
            raise ValueError(
                f"adapter.target_modules={list(self.target_modules)} with adapter.kind={self.kind}, which "
                "adapts no layer; leave it out"
            )
        return self
