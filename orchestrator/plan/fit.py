"""Whether the roles of a stage fit the devices they are given, and if not, which knob makes them fit: knobs
are tried, not guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.config import Run
from orchestrator.placement import layout, shortage
from orchestrator.plan.devices import Cluster
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

STAYS = ("CUDA context", "CUDA graphs")  # on the device, of a role that sleeps
SLEEPS = ("parameters", "optimizer", "gradients")  # in the host's memory meanwhile


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
                where = f"each of {count} {plan.cluster.device.name} of {', '.join(here)}"
                capacity = float(plan.cluster.device.memory)
                living = tuple(workers[role] for role in here)
                for when, parts in _turns(plan.run, here, workers):
                    yield Pool(where=where + when, capacity=capacity, workers=living, parts=tuple(parts))


def _turns(
    run: Run, here: Sequence[str], workers: dict[str, WorkerMemory]
) -> Iterator[tuple[str, list[Part]]]:
    """What lies on a device at once: all of everybody; or, where roles take turns with the engine
    (orchestrator/turns.py), one side whole and of the other what no process can give away."""
    if not (run.placement.take_turns and "engine" in here and len(here) > 1):
        yield "", [part for role in here for part in _labelled(role, workers[role].device)]
        return
    for when, engine_awake in ((" while the engine samples", True), (" while the others work", False)):
        parts: list[Part] = []
        for role in here:
            awake = (role == "engine") is engine_awake
            own = [part for part in workers[role].device if awake or part.name in STAYS]
            parts += _labelled(role, own)
        yield when, parts


def asleep_bytes(worker: WorkerMemory) -> float:
    """What of a worker waits in the memory of the host while it sleeps."""
    return sum(part.bytes for part in worker.device if part.name in SLEEPS)


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
        if plan.run.placement.take_turns and any(
            {"engine", role} <= set(g) for g in plan.run.placement.share
        ):
            asleep = asleep_bytes(worker) * share * tp
            parts.append(Part(name=f"{role}: asleep", bytes=asleep, spread=0.1))
    spread = 0.1 if plan.overheads.measured else 0.4
    parts.append(Part(name="driver and Ray", bytes=plan.overheads.process["driver"], spread=spread))
    return Pool(
        where="the memory of a node", capacity=float(plan.cluster.host_memory),
        workers=tuple(workers.values()), parts=tuple(parts),
    )  # fmt: skip
