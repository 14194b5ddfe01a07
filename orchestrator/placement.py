"""Which devices each role asks for, as data: the cluster is asked for exactly this, and a refusal is
explained from it.

A *group* is a Ray placement group; a *bundle* is what one node must grant at once; a *seat* is one worker's
share of a bundle. Every role has a group of its own unless ``placement.share`` puts several into one: then
worker k of each lives in bundle k, and each takes an equal part of its GPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from orchestrator.config import Run

Resources = dict[str, float]  # {"CPU": 2.0, "GPU": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One worker of one role."""

    group: int
    bundle: int
    resources: Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All seats of a stage, and the bundles that hold them."""

    groups: tuple[tuple[Resources, ...], ...]  # [group][bundle]
    seats: dict[str, tuple[Seat, ...]]  # role -> one seat per worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one role asks for, and the fields to change when that is too much."""

    workers: int
    cpus: float  # per worker
    gpus: int  # per worker
    knobs: str


def stage_roles(run: Run) -> Iterator[tuple[str, list[str]]]:
    """(stage, roles that it starts together), in their order: [("sft", ["actor"]), ...]."""
    if run.sft:
        yield "sft", ["actor"]
    if run.reward_model:
        yield "reward_model", ["reward"]
    if run.preference:
        asks, before = run.preference.objective.needs_reference, run.preference.precompute_reference
        if asks and before:
            yield "preference", ["reference"]
        yield "preference", ["actor", "reference"] if asks and not before else ["actor"]
    if run.rl:
        shared = run.placement.backbone == "shared"
        scorers = [] if shared else ["reward", *sorted(run.rl.algorithm.roles())]
        yield "rl", ["actor", "engine", *scorers]


def needs(run: Run, roles: Sequence[str]) -> dict[str, Need]:
    """An engine's worker here is a whole replica: its tensor-parallel shards live in one bundle, on one
    node."""
    table: dict[str, Need] = {}
    for role in roles:
        if role == "engine":
            engine, tp = run.engine, run.engine.tensor_parallel
            table[role] = Need(
                workers=engine.replicas,
                cpus=engine.cpus_per_worker * tp,
                gpus=tp if engine.gpus else 0,
                knobs="engine.replicas, engine.tensor_parallel or engine.cpus_per_worker",
            )
        else:
            own = getattr(run.roles, role)
            count = "gpus" if own.gpus else "workers"
            table[role] = Need(
                workers=own.num_workers,
                cpus=own.cpus_per_worker,
                gpus=int(own.gpus > 0),
                knobs=f"roles.{role}.{count} or roles.{role}.cpus_per_worker",
            )
    return table


def layout(run: Run, roles: Sequence[str]) -> Layout:
    """Bundles and seats for the roles of a stage; shared groups keep only the roles the stage has."""
    together = tuple(tuple(group) for group in run.placement.share)
    return _layout(tuple(needs(run, roles).items()), together)


@lru_cache(maxsize=64)  # a search asks again for each setting of memory, which changes no place
def _layout(wanted: tuple[tuple[str, Need], ...], together: tuple[tuple[str, ...], ...]) -> Layout:
    table = dict(wanted)
    shared: list[list[str]] = [[role for role in group if role in table] for group in together]
    alone: list[list[str]] = [[role] for role in table if not any(role in group for group in shared)]
    groups: list[tuple[Resources, ...]] = []
    seats: dict[str, tuple[Seat, ...]] = {}
    for members in [group for group in [*shared, *alone] if group]:
        bundles: list[Resources] = []
        for worker in range(max(table[role].workers for role in members)):
            here = [table[role] for role in members if worker < table[role].workers]
            bundle = {"CPU": sum(need.cpus for need in here)}
            if gpus := max(need.gpus for need in here):
                bundle["GPU"] = float(gpus)
            bundles.append(bundle)
        for role in members:
            need = table[role]
            share = {"CPU": need.cpus} | ({"GPU": need.gpus / len(members)} if need.gpus else {})
            seats[role] = tuple(
                Seat(group=len(groups), bundle=k, resources=share) for k in range(need.workers)
            )
        groups.append(tuple(bundles))
    return Layout(groups=tuple(groups), seats=seats)


def engines_apart(plan: Layout) -> Layout:
    """The same bundles, each engine's in a group of its own, where no other role lives with them.

    Bundles of one group that a host takes with it are placed again together or not at all. Engines need not
    wait for one another: each comes back as soon as there is room for it.
    """
    first, *others = plan.seats.get("engine", (None,))
    if first is None or any(
        role != "engine" and seats[0].group == first.group for role, seats in plan.seats.items()
    ):
        return plan
    groups, moved = list(plan.groups), [first]
    for seat in others:
        moved.append(replace(seat, group=len(groups), bundle=0))
        groups.append((plan.groups[first.group][seat.bundle],))
    groups[first.group] = plan.groups[first.group][:1]
    return Layout(groups=tuple(groups), seats=plan.seats | {"engine": tuple(moved)})


def shortage(run: Run, plan: Layout, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why these nodes can never grant the layout, with the numbers to change; None when nothing says they
    cannot."""
    asked = [bundle for group in plan.groups for bundle in group]
    for resource in ("GPU", "CPU"):
        total = sum(bundle.get(resource, 0.0) for bundle in asked)
        there = sum(node.get(resource, 0.0) for node in nodes)
        largest = max((bundle.get(resource, 0.0) for bundle in asked), default=0.0)
        biggest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        if total > there + 1e-6:
            return (
                f"{request(run, plan)}\nwants {total:g} {resource}; the cluster has {there:g}. "
                f"{remedy(run, plan, resource)}"
            )
        if largest > biggest + 1e-6:
            return (
                f"{request(run, plan)}\nhas one bundle of {largest:g} {resource}; "
                f"the largest node has {biggest:g}. "
                f"{remedy(run, plan, resource)}"
            )
    return None


def request(run: Run, plan: Layout) -> str:
    """What was asked, a line per role."""
    table = needs(run, list(plan.seats))
    rows = [f"  {role}: {n.workers} worker(s) x {n.cpus:g} CPU, {n.gpus} GPU" for role, n in table.items()]
    return "the placement\n" + "\n".join(rows)


def remedy(run: Run, plan: Layout, resource: str) -> str:
    """The knobs of the role that asks for the most of a resource, and the two other ways out."""
    table = needs(run, list(plan.seats))
    wanted = {role: n.workers * (n.gpus if resource == "GPU" else n.cpus) for role, n in table.items()}
    role = max(wanted, key=lambda name: wanted[name])
    return (
        f"{role} asks for the most ({wanted[role]:g} {resource}): lower {table[role].knobs}, "
        "let roles share devices with placement.share, or add nodes"
    )
