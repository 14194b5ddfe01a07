"""How the driver scales with engines: the real loop, real Ray actors, modelled service times.

    weak     every engine brings as many prompts: a step should stay as long as one engine's
    strong   the same prompts for more engines: a step should shrink as they do

An engine answers a group after ``SERVICE.generate_s``, ``slots`` at once; the time that no worker works, and
the share of reward's and reference's work that lies beside generation, are by the workers' own clocks
(``orchestrator/work.py``). The last round of slots has no generation left beside its scoring.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from actors.fleet import EngineFleet
from actors.group import ActorGroup, RewardGroup, ScorerGroup
from actors.remote_engine import RemoteEngine
from actors.remote_worker import spawn
from actors.weights.wire import Channel
from launch.bench.driver import SAMPLES_PER_PROMPT, Watch, rl_of, run
from launch.bench.result import Figure
from launch.bench.simulated import Service, SimulatedEngine, SimulatedJudge, SimulatedLearner, serving
from launch.build import Crew
from launch.cluster import Cluster
from launch.environment import WORKER_ENV
from orchestrator import metrics as names
from orchestrator.batch import Batch, ScoredRollout
from orchestrator.config import Run
from orchestrator.configfile import load_run
from orchestrator.driver_state import DriverState
from orchestrator.roles import Metrics, Roles

ENGINES = (1, 4, 16)
PER_ENGINE = 128  # prompts, weak scaling: 32 rounds of slots; scores beside the last have none to hide behind
TOGETHER = 128  # prompts, strong scaling
STEPS = 4
SERVICE = Service(response_tokens=256, generate_s=0.25, slots=4, score_s=0.002, update_s=0.05)
SIZES = {
    "engines": ENGINES, "weak_prompts_an_engine": PER_ENGINE, "strong_prompts": TOGETHER, "steps": STEPS,
    "service": asdict(SERVICE),
}  # fmt: skip
ROLE = "cpus_per_worker=0.001"


class Clocked(Watch):
    """Also what the workers say of each step."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self._cluster = cluster
        self.steps: list[dict[str, float]] = []

    async def started(self, step: int) -> None:
        self._last = time.monotonic()

    async def stepped(
        self, state: DriverState, groups: Sequence[Sequence[ScoredRollout]], batch: Batch, metrics: Metrics
    ) -> None:
        now = time.monotonic()
        self.steps.append(self._cluster.trace.step("rl", state.step, self._last, now))
        self.seconds.append(now - self._last)
        self._last = time.monotonic()


def simulated_run(folder: Path, num_engines: int) -> Run:
    return load_run(
        [],
        [
            "model.path=simulated", "rl.steps=1", f"run_dir={folder}", "tracking.trace=false",
            f"engine.replicas={num_engines}", f"engine.{ROLE}", f"roles.actor.{ROLE}",
            f"roles.reward.{ROLE}", f"roles.reference.{ROLE}", "roles.reward.function=exact_match",
            "rl.algorithm={name: grpo, kl_coef: 0.01}",
        ],
    )  # fmt: skip


async def simulated_roles(run_: Run, crew: Crew) -> Roles:
    """The real groups and the real fleet over simulated workers."""
    learner, judge = serving(SimulatedLearner, SERVICE), serving(SimulatedJudge, SERVICE)
    engine = serving(SimulatedEngine, SERVICE)
    engines = [
        RemoteEngine(
            spawn(
                engine, who=f"engine {index}", seat=seat, group=crew.groups[seat.group], env=WORKER_ENV,
                deadlines=run_.deadlines, ward=crew.ward, index=index,
            )
        )
        for index, seat in enumerate(crew.layout.seats["engine"])
    ]  # fmt: skip
    channel = Channel(transport="gloo", dtype="float32", bucket_mb=1)
    fleet = EngineFleet(engines, run_seed=0)
    crew.keep(fleet)
    await asyncio.gather(*(one.start() for one in engines))
    actor, reference, reward = await asyncio.gather(
        crew.group(learner, partial(ActorGroup, channel=channel), "actor"),
        crew.group(learner, ScorerGroup, "reference"),
        crew.group(judge, partial(RewardGroup, weights={"simulated": 1.0}), "reward"),
    )
    return Roles(actor=actor, engine=fleet, reward=reward, reference=reference)


def steps_of(num_engines: int, num_prompts: Sequence[int]) -> list[Clocked]:
    """A run of each size on one set of workers."""

    async def measured(cluster: Cluster, run_: Run) -> list[Clocked]:
        crew = Crew(run_, cluster, ["actor", "engine", "reference", "reward"])
        watches = []
        try:
            roles = await simulated_roles(run_, crew)
            for count in num_prompts:
                watches.append(Clocked(cluster))
                await run(rl_of(count, STEPS, SERVICE.response_tokens), roles, watches[-1])
        finally:
            await crew.close()
        return watches

    with tempfile.TemporaryDirectory() as folder:
        run_ = simulated_run(Path(folder), num_engines)
        with Cluster(run_) as cluster:
            return asyncio.run(measured(cluster, run_))


def ideal_s(num_prompts: int, num_engines: int) -> float:
    """Of a step in which only the services take time: rounds of full slots, and the update."""
    rounds = -(-num_prompts // (num_engines * SERVICE.slots))
    return rounds * SERVICE.generate_s + SERVICE.update_s


def measure() -> list[Figure]:
    figures = []
    for num_engines in ENGINES:
        sizes = {"weak": PER_ENGINE * num_engines, "strong": TOGETHER}
        watches = steps_of(num_engines, list(sizes.values()))
        for (kind, count), watch in zip(sizes.items(), watches, strict=True):
            ideal = ideal_s(count, num_engines)
            figures += [
                Figure(
                    name=f"scaling/{kind}/efficiency/{num_engines}_engines", unit="of the ideal",
                    better="higher", samples=[ideal / seconds for seconds in watch.seconds[1:]],
                    at=(f"efficiency by engines, {kind} scaling", num_engines),
                ),
                Figure(
                    name=f"scaling/{kind}/sequences_per_s/{num_engines}_engines", unit="1/s", better="higher",
                    samples=[count * SAMPLES_PER_PROMPT / seconds for seconds in watch.seconds[1:]],
                    at=(f"sequences a second by engines, {kind} scaling", num_engines),
                ),
                Figure(
                    name=f"scaling/{kind}/overhead/{num_engines}_engines", unit="of the step", better="lower",
                    samples=[step[names.OVERHEAD_FRACTION] for step in watch.steps[1:]],
                ),
                Figure(
                    name=f"scaling/{kind}/scoring_hidden/{num_engines}_engines", unit="of the scoring",
                    better="higher", samples=[step[names.SCORING_HIDDEN] for step in watch.steps[1:]],
                ),
            ]  # fmt: skip
    return figures
