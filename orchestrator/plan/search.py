"""Which layout of a cluster is the fastest: role sizes, sharing, tensor parallel, ZeRO stage, recomputed
activations, micro-batches and staleness.

Thousands of layouts are never simulated. A candidate is a division of the devices; for each one the cheapest
settings of memory that fit are taken (they only cost time); an estimate without a queue ranks them; the best
FINALISTS are simulated. So the work grows with the number of divisions, which is a few dozen for any cluster.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.config import Run
from orchestrator.configfile import merged
from orchestrator.plan.fit import Planned, fits
from orchestrator.plan.predict import Prediction, estimate, predict
from orchestrator.plan.remedy import excess_bytes, why_not
from orchestrator.plan.service import Rates
from orchestrator.plan.shapes import check_parallel

FINALISTS = 4
ENGINE_SHARES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # of the devices
TENSOR_PARALLEL = (1, 2, 4, 8)
TRAINED = ("actor", "critic")
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout, as the YAML that is laid on the run."""

    tree: Tree
    run: Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best layouts, the fastest first, and how many were looked at."""

    best: tuple[tuple[Candidate, Prediction], ...]
    num_divisions: int
    num_fitting: int
    num_simulated: int
    why_none: str | None  # where nothing fits: what the layout that is nearest to fitting lacks


def search(plan: Planned, rates: Rates, *, top: int) -> Found:
    """Raises ValueError for a run without an rl stage."""
    if plan.run.rl is None:
        raise ValueError("the run has no rl stage; quartet plan searches layouts of one")
    divisions = list(_divisions(plan))
    fitting = [candidate for tree in divisions if (candidate := _cheapest_that_fits(plan, tree)) is not None]
    ranked = sorted(fitting, key=lambda each: estimate(replace(plan, run=each.run), rates))[:FINALISTS]
    judged = [(candidate, predict(replace(plan, run=candidate.run), rates)) for candidate in ranked]
    judged.sort(key=lambda pair: pair[1].step_s)
    return Found(
        best=tuple(judged[:top]), num_divisions=len(divisions), num_fitting=len(fitting),
        num_simulated=len(ranked), why_none=None if fitting else _why_none(plan, divisions),
    )  # fmt: skip


def _why_none(plan: Planned, divisions: Sequence[Tree]) -> str | None:
    """With the settings that save the most memory, of the division that is the fewest bytes over."""
    runs = []
    for tree in divisions:
        with suppress(ValueError):  # e.g. a staleness that the run's other settings forbid
            runs.append(laid_on(plan.run, merged(tree, list(_memory_settings(plan, tree))[-1])))
    if not runs:
        return None
    near = replace(plan, run=min(runs, key=lambda run: excess_bytes(plan, run, "rl")))
    (found,) = [fit for fit in fits(near) if fit.stage.name == "rl"]
    return why_not(near, found)


def laid_on(run: Run, tree: Tree) -> Run:
    """The run with the layout's fields, validated again: ValueError where the two do not go together."""
    below = run.model_dump()
    if run.rl is not None:
        below["rl"]["algorithm"] = {"name": run.rl.algorithm.name, **below["rl"]["algorithm"]}
    for stage in ("reward_model", "preference"):
        own = getattr(run, stage)
        if own is not None:
            below[stage]["objective"] = {"name": own.objective.name, **below[stage]["objective"]}
    return Run(**merged(below, tree))


def _divisions(plan: Planned) -> Iterator[Tree]:
    """Every way to divide the devices, with each staleness that it allows."""
    assert plan.run.rl is not None
    staleness = sorted({0, 1, plan.run.rl.staleness})
    layouts = list(_core_layouts(plan) if plan.cluster.device.is_cpu else _gpu_layouts(plan))
    for layout, stale in itertools.product(layouts, staleness):
        if stale and layout.get("placement", {}).get("take_turns"):
            continue  # the engine cannot sample while it sleeps
        yield merged(layout, {"rl": {"staleness": stale}})


def _core_layouts(plan: Planned) -> Iterator[Tree]:
    """On cores: more engines, more ranks of the actor, more threads; all share the cores anyway."""
    cores = plan.cluster.num_devices
    for replicas, ranks in itertools.product((1, 2), (1, 2)):
        if max(replicas, ranks) <= cores:
            share = min(1.0, cores / (replicas + 2 * ranks + 3))
            yield {
                "engine": {"replicas": replicas, "cpus_per_worker": round(share, 2)},
                "roles": {"actor": {"workers": ranks, "cpus_per_worker": round(share, 2)}},
            }


def _gpu_layouts(plan: Planned) -> Iterator[Tree]:
    devices, per_node = plan.cluster.num_devices, plan.cluster.per_node
    others = _model_roles(plan)
    for tp in TENSOR_PARALLEL:
        if tp > per_node or not _divides(plan, tp):
            continue
        if devices % tp == 0:
            yield _together(devices, tp, others)
            yield merged(_together(devices, tp, others), {"placement": {"take_turns": True}})
        sizes = {max(tp, round(devices * share / tp) * tp) for share in ENGINE_SHARES}
        for engine in sorted(size for size in sizes if size < devices):
            yield _beside(engine, devices - engine, tp, others)
            if len(others) > 1 and devices - engine >= len(others):
                yield _apart(engine, devices - engine, tp, others)


def _model_roles(plan: Planned) -> list[str]:
    """Roles with a model, the engine aside."""
    rl = plan.run.rl
    assert rl is not None
    reward = plan.run.roles.reward
    judge = reward.model or plan.run.reward_model is not None
    return ["actor", *sorted(rl.algorithm.roles()), *(["reward"] if judge else [])]


def _divides(plan: Planned, tp: int) -> bool:
    try:
        check_parallel(plan.shapes.of("actor"), tp)
    except ValueError:
        return False
    return True


def _engine(gpus: int, tp: int) -> Tree:
    return {"replicas": gpus // tp, "tensor_parallel": tp, "gpus": gpus}


def _together(devices: int, tp: int, roles: list[str]) -> Tree:
    """Everybody on every device; the engine's share of the memory is found with the rest. Who takes turns
    moves its states to the host's memory and back (offload), and has all of the device meanwhile."""
    tree = _beside(devices, devices, tp, roles)
    return merged(tree, {"placement": {"share": [[*roles, "engine"]]}})


def _beside(engine: int, training: int, tp: int, roles: list[str]) -> Tree:
    """Engines on devices of their own, all the other roles together on the rest."""
    return {
        "engine": _engine(engine, tp),
        "roles": {role: {"gpus": training} for role in roles},
        "placement": {"share": [roles] if len(roles) > 1 else [], "take_turns": False},
    }


def _apart(engine: int, training: int, tp: int, roles: list[str]) -> Tree:
    """Every role on devices of its own: those that only score get an eighth each, learners the rest."""
    frozen = [role for role in roles if role not in TRAINED]
    trained = [role for role in roles if role in TRAINED]
    each = max(1, training // 8)
    left = training - each * len(frozen)
    sizes = dict.fromkeys(frozen, each)
    sizes |= {role: left // len(trained) for role in trained}
    sizes["actor"] += left % len(trained)
    return {
        "engine": _engine(engine, tp), "roles": {role: {"gpus": size} for role, size in sizes.items()},
        "placement": {"share": [], "take_turns": False},
    }  # fmt: skip


def _cheapest_that_fits(plan: Planned, tree: Tree) -> Candidate | None:
    """With the settings of memory that cost the least time; None when none fits."""
    for settings in _memory_settings(plan, tree):
        whole = merged(tree, settings)
        try:
            run = laid_on(plan.run, whole)
        except ValueError:  # e.g. a minibatch that the ranks cannot have
            return None
        found = [fit for fit in fits(replace(plan, run=run)) if fit.stage.name == "rl"]
        if all(not fit.complaints and all("not" not in pool.verdict for pool in fit.pools) for fit in found):
            return Candidate(tree=whole, run=run)
    return None


def _memory_settings(plan: Planned, tree: Tree) -> Iterator[Tree]:
    """The cheapest first: whole states before sharded ones, kept activations before recomputed ones."""
    if plan.cluster.device.is_cpu:
        yield {}
        return
    trained = [role for role in TRAINED if role in tree["roles"]]
    longest = plan.run.model.max_length
    shared = any("engine" in group for group in tree["placement"]["share"])
    turns = tree["placement"].get("take_turns", False)
    zero_stages = (2,) if turns else (2, 3)
    fractions = (0.5, 0.35, 0.25) if shared and not turns else (plan.run.engine.gpu_memory_fraction,)
    for stage, recompute, sequences, fraction in itertools.product(
        zero_stages, (False, True), (8, 4, 1), fractions
    ):
        yield {
            "model": {"gradient_checkpointing": recompute},
            "roles": {
                role: {"micro_batch_tokens": sequences * longest}
                | ({"optimizer": {"zero_stage": stage}} if role in trained else {})
                for role in tree["roles"]
            },
            "engine": {"gpu_memory_fraction": fraction},
        }
