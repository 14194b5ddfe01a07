"""A step's time before it is run: ``loop.py`` itself, in virtual time, against simulated roles."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.batch import Batch, Prompt, ScoredRollout
from orchestrator.driver_state import DriverState
from orchestrator.ledger import Ledger
from orchestrator.loop import train
from orchestrator.plan.cast import cast, copies_in
from orchestrator.plan.fit import Planned
from orchestrator.plan.service import Rates
from orchestrator.plan.simulated import SimulatedFleet, SimulatedLearner
from orchestrator.plan.stages import Stage, stages
from orchestrator.plan.virtual import Place, run_virtually
from orchestrator.plan.workload import Workload
from orchestrator.publish import Probe
from orchestrator.roles import Metrics
from orchestrator.shaping import RunningStats
from orchestrator.timed import timed
from orchestrator.timeline import StepTimes, Timeline
from orchestrator.turns import taking_turns

PERIODS = 2  # of staleness + 1 steps each, in which the schedule repeats; after as many that fill it
PROBE_TOKENS = 64  # launch/rl_stage.py
PHASES = (
    "update",
    "sync",
    "score",
    "reward",
    "generate",
    "probe",
)  # causes of idle time, the strongest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one step of the rl stage; seconds, tokens of prompts and responses."""

    step_s: float
    low_s: float
    high_s: float
    seconds: dict[str, float]  # by phase, as metrics.jsonl counts them
    tokens: float  # of a step
    busy: float  # share of all device time
    idle: dict[str, float]  # share of all device time, by what the others were at; "driver": nobody worked

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


class _Record:
    """The loop's observer: times of each step."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.steps, self.starts = timeline, [], []
        self.tokens: list[int] = []

    steps: list[StepTimes]
    starts: list[float]

    async def started(self, step: int) -> None:
        self.timeline.end_step()

    async def stepped(
        self, state: DriverState, groups: Sequence[Sequence[ScoredRollout]], batch: Batch, metrics: Metrics
    ) -> None:
        self.steps.append(self.timeline.end_step())
        self.tokens.append(int(batch.tokens.sum()))


def predict(plan: Planned, rates: Rates) -> Prediction:
    """Expected, and with every rate at either end of its interval. Raises ValueError for a run without an rl
    stage."""
    expected = simulate(plan, rates)
    ends = [1 - rates.error, 1 + rates.error]  # all times scale alike: the schedule stays what it is
    return replace(expected, low_s=expected.step_s * ends[0], high_s=expected.step_s * ends[1])


def simulate(plan: Planned, rates: Rates) -> Prediction:
    """The mean step of the steady state."""
    found = [stage for stage in stages(plan.run, plan.shapes, plan.workload) if stage.name == "rl"]
    if not found or plan.workload is None or plan.run.rl is None:
        raise ValueError("the run has no rl stage; quartet plan predicts the time of one")
    return run_virtually(_simulate(plan, found[0], rates, plan.workload))


async def _simulate(plan: Planned, stage: Stage, rates: Rates, workload: Workload) -> Prediction:
    rl = plan.run.rl
    assert rl is not None
    warm = 1 + 2 * rl.staleness
    measured = PERIODS * (rl.staleness + 1)
    copies = copies_in(plan)
    prompts_per_step = rl.prompts_per_step // copies
    rl = rl.model_copy(
        update={"steps": warm + measured, "critic_warmup": 0, "prompts_per_step": prompts_per_step}
    )
    loop = asyncio.get_running_loop()
    timeline = Timeline(clock=loop.time)
    places, roles = cast(plan, stage, rates, workload, copies=copies)
    if plan.run.placement.take_turns:
        share = plan.run.placement.share
        roles = taking_turns(roles, frozenset(role for g in share if "engine" in g for role in g))
    record = _Record(timeline)
    prompts = [
        Prompt(uid=f"0/{row}", row=row, tokens=(workload.prompt,), text="", label=None)
        for row in range(4 * rl.prompts_per_step)
    ]
    start = DriverState(step=0, kl_coef=rl.algorithm.initial_kl_coef, rewards=RunningStats())
    probe = Probe(tokens=(1,) * min(PROBE_TOKENS, plan.run.model.max_length - 1), tolerance=1.0)
    await train(
        rl, timed(roles, timeline), Ledger(prompts, seed=plan.run.seed), observer=record, probe=probe,
        start=start, seed=plan.run.seed, pad_id=0,
    )  # fmt: skip
    return _summary(record, places, warm, copies)


def _summary(record: _Record, places: Sequence[tuple[Place, float]], warm: int, copies: int) -> Prediction:
    steps = record.steps[warm:]
    wall = sum(step.wall_s for step in steps)
    begin = sum(step.wall_s for step in record.steps[:warm])
    names = {phase for step in steps for phase in step.seconds}
    busy, idle = idle_shares(places, begin, begin + wall)
    return Prediction(
        step_s=wall / len(steps), low_s=0.0, high_s=0.0,
        seconds={str(name): sum(step.seconds.get(name, 0.0) for step in steps) / len(steps) for name in
        names}, tokens=copies * sum(record.tokens[warm:]) / len(steps), busy=busy, idle=idle,
    )  # fmt: skip


def idle_shares(
    places: Sequence[tuple[Place, float]], begin: float, end: float
) -> tuple[float, dict[str, float]]:
    """(busy share, {cause: share}) of the device time of [begin, end]; each place with the devices it stands
    for.

    What a place leaves idle is put down to what is under way anywhere at that moment, in the order of
    PHASES: it waits for that. Example: one place of capacity 1 generates in [0, 6] and another updates in
    [6, 8]: busy 8 of 16, idle by generate 6, by update 2.
    """
    events: list[tuple[float, int, int, str, float]] = []
    for index, (place, _) in enumerate(places):
        for work in place.history:
            if work.end > begin and work.start < end:
                events.append((max(work.start, begin), 1, index, work.phase, work.demand))
                events.append((min(work.end, end), 0, index, work.phase, work.demand))
    events.sort()
    demand = [0.0] * len(places)
    active = dict.fromkeys(PHASES, 0)
    all_s = sum(place.capacity * count for place, count in places)
    used, busy, idle, at = 0.0, 0.0, dict.fromkeys((*PHASES, "driver"), 0.0), begin
    for now, begins, index, phase, wanted in [*events, (end, 0, 0, "", 0.0)]:
        if now > at:
            busy += used * (now - at)
            cause = next((name for name in PHASES if active[name]), "driver")
            idle[cause] += (all_s - used) * (now - at)
            at = now
        if phase:
            place, count = places[index]
            before = min(place.capacity, demand[index])
            demand[index] += wanted if begins else -wanted
            used += (min(place.capacity, demand[index]) - before) * count
            active[phase] += 1 if begins else -1
    device_s = all_s * (end - begin)
    return busy / device_s, {cause: s / device_s for cause, s in idle.items() if s > 1e-9 * device_s}


def estimate(plan: Planned, rates: Rates) -> float:
    """Seconds of a step without a queue, for ranking: sequences of mean length, engines always full, roles
    on the same devices one after the other, generation beside the rest where staleness lets it."""
    (stage,) = [each for each in stages(plan.run, plan.shapes, plan.workload) if each.name == "rl"]
    rl, flow, run = plan.run.rl, plan.workload, plan.run
    assert rl is not None and flow is not None
    _, roles = cast(plan, stage, rates, flow)
    batch = rl.prompts_per_step * rl.samples_per_prompt
    minibatch = batch // rl.updates.minibatches
    whole, answer = round(flow.mean), round(flow.response)
    learned = 0.0
    for role, learner in roles.learners():
        assert isinstance(learner, SimulatedLearner)
        once = learner.service.update([whole] * minibatch, [answer] * minibatch, learner.optimizer)
        seconds = rl.updates.epochs * rl.updates.minibatches * once
        seconds += learner.service.forward([whole] * batch, [answer] * batch)
        together = any({"actor", "critic"} <= set(group) for group in run.placement.share)
        learned = learned + seconds if together or role == "actor" else max(learned, seconds)
    fleet = roles.engine
    assert isinstance(fleet, SimulatedFleet)
    running = min(run.engine.max_num_seqs, max(1, batch // len(fleet.engines)))
    rounds = max(1.0, batch / len(fleet.engines) / running)
    generated = rounds * flow.response * fleet.engines[0].service.decode(running, whole)
    generated += (flow.limit - flow.response) * fleet.engines[0].service.decode(max(1, running // 8), whole)
    alone = not any("engine" in group for group in run.placement.share)
    return max(generated, learned) if rl.staleness and alone else generated + learned
