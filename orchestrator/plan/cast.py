"""Who plays a run's roles in virtual time, and on which devices.

A step of many thousand sequences is not simulated whole: one prompt and one engine then stand for ``copies``
of each. The engines' queues are as long as in the run, and whoever scores and learns counts each sequence so
many times; but fewer lengths are drawn.
"""

from __future__ import annotations

import math
from dataclasses import replace

from orchestrator.placement import layout
from orchestrator.plan.fit import Planned, asleep_bytes, setting_of
from orchestrator.plan.memory import Job, kv_capacity, worker_memory
from orchestrator.plan.service import Rates, Service
from orchestrator.plan.simulated import (
    Seats,
    SimulatedEngine,
    SimulatedFleet,
    SimulatedLearner,
    SimulatedPolicy,
    SimulatedReward,
    SimulatedScorer,
)
from orchestrator.plan.stages import Stage
from orchestrator.plan.virtual import Place
from orchestrator.plan.workload import Workload
from orchestrator.roles import Roles

ENOUGH = 512  # sequences of a step: so many are simulated at least


def copies_in(plan: Planned) -> int:
    """For how many prompts one simulated prompt stands. Example: 2048 prompts x 8 samples on 256 engines: 32,
    so that 64 prompts are sampled by 8 engines."""
    rl = plan.run.rl
    if rl is None or plan.cluster.device.is_cpu or rl.prompts_per_step % rl.updates.minibatches:
        return 1  # cores are shared by all that a node has: none stands for another
    alike = math.gcd(plan.run.engine.replicas, rl.prompts_per_step // rl.updates.minibatches)
    most = rl.prompts_per_step * rl.samples_per_prompt // ENOUGH
    return max((n for n in range(1, min(alike, most) + 1) if alike % n == 0), default=1)


def cast(
    plan: Planned, stage: Stage, rates: Rates, workload: Workload, *, copies: int = 1
) -> tuple[list[tuple[Place, float]], Roles]:
    """The places, each with the number of devices it stands for, and the roles on them, for steps of
    ``rl.prompts_per_step / copies`` prompts."""
    run, cluster = plan.run, plan.cluster
    jobs = {job.role: job for job in stage.jobs}
    seats, places = _seats(plan, stage, rates, copies)
    setting = setting_of(plan, stage)
    engine_shape = jobs["engine"].shape
    assert engine_shape is not None

    def service(job: Job) -> Service:
        own = getattr(run.roles, job.role)
        stage_3 = job.optimizer is not None and job.optimizer.zero_stage == 3
        assert job.shape is not None
        return Service(
            shape=job.shape, rates=rates, cluster=cluster, dtype=run.model.dtype, ranks=own.num_workers,
            threads=1 if own.gpus else own.threads, micro_batch_tokens=own.micro_batch_tokens,
            checkpointing=run.model.gradient_checkpointing, sharded=stage_3,
        )  # fmt: skip

    engine = Service(
        shape=engine_shape, rates=rates, cluster=cluster, dtype=run.engine.dtype or run.model.dtype,
        ranks=run.engine.tensor_parallel, threads=1 if run.engine.gpus else run.engine.threads,
    )  # fmt: skip
    cache = kv_capacity(setting, engine_shape)
    engines = [
        SimulatedEngine(one, engine, max_num_seqs=run.engine.max_num_seqs, cache_tokens=cache)
        for one in seats["engine"]
    ]
    actor, reward = jobs["actor"], jobs["reward"]
    policy = service(actor)
    together = {role: Seats(places=tuple(p for one in each for p in one.places), demand=each[0].demand)
                for role, each in seats.items()}  # fmt: skip
    assert actor.optimizer is not None
    critic = jobs.get("critic")
    fewer = len(seats["reward"]) < run.roles.reward.num_workers  # each has as much to do as in the run
    judge = None if reward.shape is None else replace(service(reward), ranks=1)
    roles = Roles(
        actor=SimulatedPolicy(
            together["actor"], policy, actor.optimizer, engines=run.engine.replicas, copies=copies
        ),
        engine=SimulatedFleet(engines, workload, seed=run.seed, sync_s=policy.sync(1)),
        reward=SimulatedReward(seats["reward"], judge, seed=run.seed, copies=1 if fewer else copies),
        critic=None
        if critic is None or critic.optimizer is None
        else SimulatedLearner(together["critic"], service(critic), critic.optimizer, copies=copies),
        reference=SimulatedScorer(together["reference"], service(jobs["reference"]), copies=copies)
        if "reference" in jobs
        else None,
    )
    for name, role in roles.all():
        worker = worker_memory(setting, jobs[name])
        role.resident_bytes = asleep_bytes(worker)  # type: ignore[attr-defined]
    return places, roles


def _seats(
    plan: Planned, stage: Stage, rates: Rates, copies: int
) -> tuple[dict[str, list[Seats]], list[tuple[Place, float]]]:
    """A place per node of cores. On GPUs one for all that do the same at once: the data-parallel workers of
    a group of roles; but one for each engine and each worker of the reward, which do not, or for ``copies``
    of them."""
    run, cluster = plan.run, plan.cluster
    seats: dict[str, list[Seats]] = {}
    places: list[tuple[Place, float]] = []
    if cluster.device.is_cpu:
        cores = cluster.per_node * rates.sharing
        nodes = [Place(f"node {k}", max(1.0, cores)) for k in range(cluster.nodes)]
        for role in stage.roles:
            engine = role == "engine"
            workers = run.engine.replicas if engine else getattr(run.roles, role).num_workers
            threads = run.engine.threads if engine else getattr(run.roles, role).threads
            demand = float(threads * (run.engine.tensor_parallel if engine else 1))
            seats[role] = [Seats(places=(nodes[k % len(nodes)],), demand=demand) for k in range(workers)]
        return seats, [(node, 1.0) for node in nodes]
    found = layout(run, stage.roles)
    for group, bundles in enumerate(found.groups):
        members = [role for role, at in found.seats.items() if at[0].group == group]
        devices = sum(bundle.get("GPU", 0.0) for bundle in bundles)
        apart = len(members) == 1 and members[0] in ("engine", "reward")
        count = _fewer(len(bundles), copies) if apart else 1
        made = [Place(f"{'+'.join(members)} {k}") for k in range(count)]
        places += [(place, devices / count) for place in made if devices]
        for role in members:
            if role in ("engine", "reward"):
                whole = run.engine.replicas if role == "engine" else len(found.seats[role])
                number = _fewer(whole, copies)
                share = 1.0 if apart else 1.0 / number
                seats[role] = [Seats(places=(made[k % count],), demand=share) for k in range(number)]
            else:
                seats[role] = [Seats(places=(made[0],), demand=1.0)]
    return seats, places


def _fewer(number: int, copies: int) -> int:
    return number if number % copies else number // copies
