"""The rollout engines: one Ray worker per replica, and how weights reach them."""

from ray.util.placement_group import PlacementGroup

from actors.adapter import linear_names
from actors.engine import EngineWorker
from actors.engine_params import Device, environment
from actors.remote_engine import RemoteEngine
from actors.remote_worker import spawn
from actors.ward import Ward
from actors.weights.wire import Channel, ServedAdapter, Transport
from launch.environment import WORKER_ENV
from launch.trainable import skeleton
from orchestrator.config import Run
from orchestrator.placement import Seat


def spawn_engine(  # noqa: PLR0913 - one line per fact
    run: Run,
    model: str,
    seat: Seat,
    group: PlacementGroup,
    ward: Ward,
    *,
    index: int,
    adapter: ServedAdapter | None = None,
) -> RemoteEngine:
    """Its model loads in ``start``. ``adapter``: is all it will be sent."""
    device: Device = "cuda" if run.engine.gpus else "cpu"
    return RemoteEngine(
        spawn(
            EngineWorker, who=f"engine {index}", seat=seat, group=group, ward=ward,
            env={**WORKER_ENV, **environment(run.engine, device)}, deadlines=run.deadlines,
            config=run.engine, model=model, revision=run.model.revision, dtype=run.model.dtype,
            max_length=run.model.max_length, index=index, device=device, transport=transport(run),
            sleeps=bool(turn_takers(run)), adapter=adapter,
        )
    )  # fmt: skip


def transport(run: Run) -> Transport:
    """gloo between CPUs, device memory handles where actor and engine share devices, NCCL otherwise."""
    if not run.engine.gpus:
        return "gloo"
    together = any("actor" in group and "engine" in group for group in run.placement.share)
    return "ipc" if together else "nccl"


def turn_takers(run: Run) -> frozenset[str]:
    """The engine and the roles that share its devices, where they take turns on them."""
    if not run.placement.take_turns:
        return frozenset()
    return frozenset(role for group in run.placement.share if "engine" in group for role in group)


def served_adapter(run: Run, base: str) -> ServedAdapter | None:
    """What the engines serve themselves; None where they receive whole weights."""
    adapter = run.model.training(run.roles.actor.adapter).adapter
    if adapter is None or run.engine.receive == "weights":
        return None
    layers = adapter.target_modules or linear_names(skeleton(run, base).model.base_model)
    ends = {name.rpartition(".")[2] for name in layers}
    return ServedAdapter(rank=adapter.rank, alpha=adapter.alpha, layers=tuple(sorted(ends)))


def channel(run: Run, adapter: ServedAdapter | None) -> Channel:
    """How the actor's weights travel, or the adapter alone."""
    return Channel(
        transport=transport(run),
        dtype=run.engine.dtype or run.model.dtype,
        bucket_mb=run.engine.bucket_mb,
        adapter=adapter,
    )
