"""Why a stage does not fit, and the knob that makes it fit: knobs are tried, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from orchestrator.config import Run
from orchestrator.plan.devices import GIB
from orchestrator.plan.fit import Fit, Planned, fits
from orchestrator.plan.memory import low


def why_not(plan: Planned, found: Fit) -> str | None:
    """What cannot fit and which knob makes it fit; None when nothing says that it cannot."""
    if found.complaints:
        return f"stage {found.stage.name}: {found.complaints[0]}"
    for pool in found.pools:
        if pool.cannot:
            largest = sorted(pool.parts, key=lambda part: -part.bytes)[:3]
            names = ", ".join(f"{part.name} {part.bytes / GIB:.3g}" for part in largest)
            return (
                f"stage {found.stage.name} wants at least {low(pool.parts) / GIB:.3g} GiB of {pool.where}, "
                "which has "
                f"{pool.capacity / GIB:.3g} (largest: {names}); {_remedy(plan, found.stage.name)}"
            )
    return None


def _remedy(plan: Planned, stage: str) -> str:
    """The knobs that make the stage fit, fewest first: each alone, then each on top of those before it."""
    alone = [text for text, run in _knobs(plan.run) if _fits_with(plan, run, stage)]
    if alone:
        return "fits with " + ", or ".join(alone[:3])
    run = plan.run
    together: list[str] = []
    while True:
        better = [(excess_bytes(plan, changed, stage), text, changed) for text, changed in _knobs(run)]
        if not better:
            break
        excess, text, changed = min(better, key=lambda entry: entry[0])
        if excess >= excess_bytes(plan, run, stage):
            break
        run, together = changed, [*together, text]
        if _fits_with(plan, run, stage):
            return "fits with " + " and ".join(together)
    return "no knob makes it fit: take devices with more memory, or a smaller model"


def excess_bytes(plan: Planned, run: Run, stage: str) -> float:
    """Bytes over the capacity in all kinds of devices, at least; infinite for what cannot be placed."""
    found = _stage_fit(plan, run, stage)
    if found is None or found.complaints:
        return float("inf")
    return sum(max(0.0, low(pool.parts) - pool.capacity) for pool in found.pools)


def _stage_fit(plan: Planned, run: Run, stage: str) -> Fit | None:
    return next((found for found in fits(replace(plan, run=run)) if found.stage.name == stage), None)


def _fits_with(plan: Planned, run: Run, stage: str) -> bool:
    found = _stage_fit(plan, run, stage)
    return found is not None and not found.cannot


def _knobs(run: Run) -> Iterator[tuple[str, Run]]:
    """Changes as the YAML fields they are, the cheapest first."""
    if not run.model.gradient_checkpointing:
        model = run.model.model_copy(update={"gradient_checkpointing": True})
        yield "model.gradient_checkpointing=true", run.model_copy(update={"model": model})
    yield from _role_knobs(run)
    if run.engine.gpus:
        yield from _engine_knobs(run)
    if run.placement.share:
        placement = run.placement.model_copy(update={"share": ()})
        yield "placement.share=[]", run.model_copy(update={"placement": placement})
    if run.model.dtype == "float32":
        model = run.model.model_copy(update={"dtype": "bfloat16"})
        yield "model.dtype=bfloat16", run.model_copy(update={"model": model})


def _role_knobs(run: Run) -> Iterator[tuple[str, Run]]:
    present = [role for role in ("actor", "critic", "reward", "reference") if getattr(run.roles, role)]
    trained = [role for role in present if role in ("actor", "critic")]
    smallest = run.model.max_length
    for role in present:
        if getattr(run.roles, role).micro_batch_tokens > smallest:
            field = f"roles.{role}.micro_batch_tokens={smallest}"
            yield field, with_role(run, role, {"micro_batch_tokens": smallest})
    for role in trained:
        own = getattr(run.roles, role)
        if own.optimizer.zero_stage < 3 and own.num_workers > 1:
            optimizer = own.optimizer.model_copy(update={"zero_stage": 3})
            yield f"roles.{role}.optimizer.zero_stage=3", with_role(run, role, {"optimizer": optimizer})
    for role in trained:
        gpus = getattr(run.roles, role).gpus
        for times in (2, 4, 8):
            if gpus:
                yield f"roles.{role}.gpus={gpus * times}", with_role(run, role, {"gpus": gpus * times})


def _engine_knobs(run: Run) -> Iterator[tuple[str, Run]]:
    def changed(update: dict[str, object]) -> Run:
        return run.model_copy(update={"engine": run.engine.model_copy(update=update)})

    for fraction in (0.6, 0.4, 0.25):
        if run.engine.kv_cache_mb is None and fraction < run.engine.gpu_memory_fraction:
            yield f"engine.gpu_memory_fraction={fraction}", changed({"gpu_memory_fraction": fraction})
    for tp in (2, 4, 8):
        if tp > run.engine.tensor_parallel:
            text = f"engine.tensor_parallel={tp} (engine.gpus={run.engine.replicas * tp})"
            yield text, changed({"tensor_parallel": tp, "gpus": run.engine.replicas * tp})


def with_role(run: Run, role: str, changes: dict[str, object]) -> Run:
    """The run with these fields of a role changed."""
    own = getattr(run.roles, role).model_copy(update=changes)
    return run.model_copy(update={"roles": run.roles.model_copy(update={role: own})})
