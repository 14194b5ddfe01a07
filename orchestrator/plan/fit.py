"""Whether the roles of a stage fit the devices they are given, and if not, which knob makes them fit: knobs
are tried, not guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.config import Run
from orchestrator.placement import layout, shortage
from orchestrator.plan.devices import GIB, Cluster
from orchestrator.plan.memory import (
    Overheads,
    Part,
    Setting,
    WorkerMemory,
    high,
    kv_capacity,
    low,
    total,
    worker_memory,
)
from orchestrator.plan.shapes import Shape, check_parallel
from orchestrator.plan.stages import Shapes, Stage, stages
from orchestrator.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One device, or the memory of one node, and who lives there."""

    where: str  # "each of 8 H200 of actor, reference"
    capacity: float  # bytes
    workers: tuple[WorkerMemory, ...]
    parts: tuple[Part, ...]

    @property
    def cannot(self) -> bool:
        """Even if every estimate is too high."""
        return low(self.parts) > self.capacity

    @property
    def verdict(self) -> str:
        if self.cannot:
            return "does not fit"
        if high(self.parts) <= self.capacity:
            return "fits"
        return "probably fits" if total(self.parts) <= self.capacity else "probably does not fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One stage on one cluster."""

    stage: Stage
    pools: tuple[Pool, ...]
    complaints: tuple[
        str, ...
    ]  # of parallelism, placement and the engine's cache: no matter of bytes in a pool

    @property
    def cannot(self) -> bool:
        return bool(self.complaints) or any(pool.cannot for pool in self.pools)

    @property
    def certain(self) -> bool:
        """Whether it fits even if every estimate is too low."""
        return not self.complaints and all(pool.verdict == "fits" for pool in self.pools)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What a prediction is about."""

    run: Run
    shapes: Shapes
    cluster: Cluster
    workload: Workload | None  # of the rl stage
    overheads: Overheads


def fits(plan: Planned) -> list[Fit]:
    """Every stage of the run."""
    return [fit(plan, stage) for stage in stages(plan.run, plan.shapes, plan.workload)]


def setting_of(plan: Planned, stage: Stage) -> Setting:
    return Setting(
        run=plan.run, workload=stage.workload, device=plan.cluster.device, overheads=plan.overheads,
        serves="engine" in stage.roles,
    )  # fmt: skip


def fit(plan: Planned, stage: Stage) -> Fit:
    setting = setting_of(plan, stage)
    workers = {job.role: worker_memory(setting, job) for job in stage.jobs}
    shapes = {job.role: job.shape for job in stage.jobs}
    complaints = list(_parallelism(plan, stage))
    if not complaints and setting.serves:
        engine = shapes["engine"]
        assert engine is not None
        complaints += _cache(setting, engine)
    devices = () if plan.cluster.device.is_cpu else tuple(_device_pools(plan, stage, workers))
    return Fit(stage=stage, pools=(*devices, _host_pool(plan, stage, workers)), complaints=tuple(complaints))


def _parallelism(plan: Planned, stage: Stage) -> Iterator[str]:
    """Heads that do not divide, engines that are larger than a node, more devices than there are."""
    run, cluster = plan.run, plan.cluster
    if "engine" in stage.roles:
        shape = plan.shapes.of("actor")
        try:
            check_parallel(shape, run.engine.tensor_parallel)
        except ValueError as error:
            yield str(error)
    kind = "GPUs" if not cluster.device.is_cpu else "CPUs"
    for role in stage.roles:
        gpus = run.engine.gpus if role == "engine" else getattr(run.roles, role).gpus
        field = "engine" if role == "engine" else f"roles.{role}"
        if cluster.device.is_cpu and gpus:
            yield (
                f"{field}.gpus={gpus} on a cluster of {kind} ({cluster.text}); give a cluster with GPUs, "
                "or gpus: 0"
            )
            return
        if not cluster.device.is_cpu and not gpus and role in ("actor", "engine"):
            yield f"{field}.gpus=0 on a cluster of {kind} ({cluster.text}); set it, or take a layout below"
            return
    cpus = float(cluster.per_node) if cluster.device.is_cpu else float("inf")
    node = {"CPU": cpus, "GPU": 0.0 if cluster.device.is_cpu else float(cluster.per_node)}
    why = shortage(run, layout(run, stage.roles), [node] * cluster.nodes)
    if why is not None:
        yield why


def _cache(setting: Setting, shape: Shape) -> Iterator[str]:
    """vLLM refuses to start when its cache does not hold one sequence of the longest length."""
    tokens, longest = kv_capacity(setting, shape), setting.run.model.max_length
    if tokens < longest:
        knob = "engine.kv_cache_mb" if setting.run.engine.kv_cache_mb or setting.device.is_cpu else (
            "engine.gpu_memory_fraction or engine.tensor_parallel"
        )  # fmt: skip
        yield (
            f"the engine's KV cache holds {tokens:.0f} tokens, model.max_length={longest} wants that many "
            "for one "
            f"sequence; raise {knob}, or lower model.max_length"
        )


def _device_pools(plan: Planned, stage: Stage, workers: dict[str, WorkerMemory]) -> Iterator[Pool]:
    """Devices that hold the same workers are one pool."""
    places = layout(plan.run, stage.roles)
    for group, bundles in enumerate(places.groups):
        members = [role for role, seats in places.seats.items() if seats[0].group == group]
        counted: dict[tuple[str, ...], int] = {}
        for index, bundle in enumerate(bundles):
            here = tuple(role for role in members if index < len(places.seats[role]) and bundle.get("GPU"))
            counted[here] = counted.get(here, 0) + int(bundle.get("GPU", 0))
        for here, count in counted.items():
            if here and count:
                parts = [part for role in here for part in _labelled(role, workers[role].device)]
                where = f"each of {count} {plan.cluster.device.name} of {', '.join(here)}"
                capacity = float(plan.cluster.device.memory)
                yield Pool(
                    where=where,
                    capacity=capacity,
                    workers=tuple(workers[r] for r in here),
                    parts=tuple(parts),
                )


def _labelled(role: str, parts: Sequence[Part]) -> list[Part]:
    return [Part(name=f"{role}: {part.name}", bytes=part.bytes, spread=part.spread) for part in parts]


def _host_pool(plan: Planned, stage: Stage, workers: dict[str, WorkerMemory]) -> Pool:
    """Of the fullest node: bundles are spread evenly, the driver is on one of them."""
    places = layout(plan.run, stage.roles)
    parts = []
    for role, worker in workers.items():
        share = min(float(len(places.seats[role])), -(-len(places.seats[role]) // plan.cluster.nodes))
        tp = plan.run.engine.tensor_parallel if role == "engine" and not plan.cluster.device.is_cpu else 1
        parts += [
            Part(name=f"{role}: {part.name}", bytes=part.bytes * share * tp, spread=part.spread)
            for part in worker.host
        ]
    spread = 0.1 if plan.overheads.measured else 0.4
    parts.append(Part(name="driver and Ray", bytes=plan.overheads.process["driver"], spread=spread))
    return Pool(
        where="the memory of a node", capacity=float(plan.cluster.host_memory),
        workers=tuple(workers.values()), parts=tuple(parts),
    )  # fmt: skip


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
