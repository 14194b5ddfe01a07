"""What is trained instead of all the weights, and which kinds a stage, a role or the engine cannot carry.

merges          lora, dora, adalora          a plain model folder comes out; any stage
lives beside    prefix, prompt, p_tuning     stays a PEFT folder: nothing after it can load it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.config.run import Run

PROMPT_KINDS = ("prefix", "prompt", "p_tuning")
MAX_SERVED_RANK = 512  # vLLM's largest max_lora_rank


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


def check_adapters(run: Run) -> None:
    """ValueError for what a stage, a role or the engine cannot carry."""
    trained = trained_with(run)
    for field, (adapter, zero_stage, num_workers) in trained.items():
        if run.model.freeze and adapter is not None:
            raise ValueError(
                f"model.freeze={list(run.model.freeze)} and {field}.kind={adapter.kind} are both set; an "
                "adapter freezes all the weights: keep one of them"
            )
        if adapter is not None:
            _check_sharding(run, field, adapter, zero_stage=zero_stage, num_workers=num_workers)
    _check_stages(run)
    if run.rl is not None:
        _check_engine(run)


def trained_with(run: Run) -> dict[str, tuple[Adapter | None, int, int]]:
    """Of each stage or role under training, by the field that says it: its adapter, its ZeRO stage, and its
    workers."""
    model, roles = run.model, run.roles
    found: dict[str, tuple[Adapter | None, int, int]] = {}
    places = {"sft": roles.actor, "reward_model": roles.reward, "preference": roles.actor}
    for name, place in places.items():
        stage = getattr(run, name)
        if stage is not None:
            adapter = model.training(stage.adapter).adapter
            found[f"{name}.adapter"] = (adapter, stage.optimizer.zero_stage, place.num_workers)
    if run.rl is not None:
        for name in ("actor", *sorted({"critic"} & run.rl.algorithm.roles())):
            role = getattr(roles, name)
            if role is not None:
                adapter = model.training(role.adapter).adapter
                found[f"roles.{name}.adapter"] = (adapter, role.optimizer.zero_stage, role.num_workers)
    return found


def _check_sharding(run: Run, field: str, adapter: Adapter, *, zero_stage: int, num_workers: int) -> None:
    sharded = zero_stage == 3 and num_workers > 1
    if sharded and (adapter.kind in ("dora", *PROMPT_KINDS) or adapter.quantize):
        what = f"quantize={adapter.quantize}" if adapter.quantize else f"kind={adapter.kind}"
        raise ValueError(
            f"{field}.{what} reads weights outside of the layers that ZeRO stage 3 gathers them for; set "
            "optimizer.zero_stage to 2 or less, or use lora"
        )
    whole = run.model.dtype == "float32" and (zero_stage == 0 or num_workers == 1)
    if adapter.kind == "adalora" and not whole:
        raise ValueError(
            f"{field}.kind=adalora weighs ranks by whole gradients, which ZeRO stage {zero_stage} in "
            f"{run.model.dtype} on {num_workers} worker(s) does not keep; use model.dtype=float32 and "
            "optimizer.zero_stage=0, or use lora"
        )


def _check_stages(run: Run) -> None:
    """Prefix, prompt and p_tuning cannot be merged, so what they trained only PEFT loads."""
    order = ("sft", "reward_model", "preference", "rl")
    present = [name for name in order if getattr(run, name) is not None]
    for name in present:
        if name == "rl":
            continue
        stage = getattr(run, name)
        adapter = run.model.training(stage.adapter).adapter
        if adapter is None or adapter.merges:
            continue
        later = present[present.index(name) + 1 :]
        if name == "reward_model":
            later = [other for other in later if other == "rl"]
        if later:
            raise ValueError(
                f"{name}.adapter.kind={adapter.kind} cannot be merged into a model folder, which {later[0]} "
                f"would start from; use lora, dora or adalora in {name}, or make it the last stage"
            )
        if name == "sft" and run.sft is not None and run.sft.packing:
            raise ValueError(
                f"sft.packing with sft.adapter.kind={adapter.kind}: only the first row of a packed sequence "
                "would see the virtual tokens; use packing: false, or lora"
            )


def _check_engine(run: Run) -> None:
    adapter = run.model.training(run.roles.actor.adapter).adapter
    if adapter is not None and not adapter.merges:
        raise ValueError(
            f"roles.actor.adapter.kind={adapter.kind} in the rl stage: neither vLLM nor the weight transfer "
            "carries virtual tokens, so samples would come from another policy; use lora, dora or adalora"
        )
    if run.engine.receive == "weights":
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
