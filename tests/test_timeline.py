"""Seconds per phase and of the driver, from intervals made by hand."""

import asyncio

import pytest

from orchestrator.roles import Roles
from orchestrator.timed import timed
from orchestrator.timeline import Phase, Span, Timeline, step_times, union_s
from tests.fakes import prompt


class Clock:
    """Tells the time it was set to."""

    now = 0.0

    def __call__(self):
        return self.now


def span(phase, start, end, role="engine"):
    return Span(role=role, phase=phase, start=start, end=end)


def test_union_counts_an_overlap_once():
    assert union_s([(0, 4), (1, 5), (7, 9), (8, 8.5), (3, 2)]) == 7
    assert union_s([]) == 0


def test_overlapping_calls_count_once_and_the_rest_is_the_driver():
    spans = [
        span(Phase.GENERATE, 0, 4),
        span(Phase.GENERATE, 1, 5),
        span(Phase.REWARD, 4, 6, "reward"),
        span(Phase.UPDATE, 7, 9, "actor"),
    ]
    times = step_times(spans, 0, 10)
    assert times.seconds == {Phase.GENERATE: 5, Phase.REWARD: 2, Phase.UPDATE: 2}
    assert times.driver_s == 2  # 6 to 7, and 9 to 10
    assert times.driver_fraction == 0.2
    assert times.metrics() == {
        "step_s": 10,
        "driver_s": 2,
        "driver_fraction": 0.2,
        "seconds/generate": 5,
        "seconds/reward": 2,
        "seconds/update": 2,
    }


def test_a_call_in_flight_is_shared_between_the_steps():
    clock = Clock()
    timeline = Timeline(clock)
    clock.now = 2.0
    with timeline.span("engine", Phase.GENERATE):
        clock.now = 10.0
        first = timeline.end_step()
        clock.now = 13.0
    clock.now = 15.0
    second = timeline.end_step()
    assert (first.wall_s, first.seconds, first.driver_s) == (10, {Phase.GENERATE: 8}, 2)
    assert (second.wall_s, second.seconds, second.driver_s) == (5, {Phase.GENERATE: 3}, 2)


def test_a_failed_call_took_its_time():
    clock = Clock()
    timeline = Timeline(clock)
    with pytest.raises(RuntimeError), timeline.span("actor", Phase.UPDATE):
        clock.now = 3.0
        raise RuntimeError
    assert timeline.end_step().seconds == {Phase.UPDATE: 3}


def test_a_step_without_time_has_no_driver_fraction():
    assert step_times([], 1.0, 1.0).driver_fraction == 0.0


class Ticking:
    """A role of every kind whose calls take one second each and answer with what they were given."""

    def __init__(self, clock):
        self.clock = clock

    async def _tick(self, answer=None):
        await asyncio.sleep(0)
        self.clock.now += 1
        return answer

    async def health(self):
        self.clock.now += 100

    async def close(self):
        self.clock.now += 100

    async def score(self, batch):
        return await self._tick(("scored", batch))

    async def update(self, minibatch):
        return await self._tick({"loss": 1.0})

    async def save(self, folder, background):
        await self._tick()

    async def saved(self, wait):
        await self._tick()
        return wait

    async def load(self, folder):
        await self._tick()

    async def export(self, folder):
        await self._tick()

    async def send_weights(self, version):
        return await self._tick(version)

    async def prepare_weights(self, policy, version):
        return await self._tick([version])

    async def commit_weights(self, version):
        await self._tick()

    async def logprobs(self, tokens):
        return await self._tick([-1.0])

    async def generate(self, prompt, num_samples, sampling):
        return await self._tick([prompt] * num_samples)


async def test_each_verb_of_a_timed_role_is_in_its_phase_and_answers_as_before():
    clock = Clock()
    timeline = Timeline(clock)
    role = Ticking(clock)
    roles = timed(Roles(actor=role, engine=role, reward=role, critic=role, reference=role), timeline)

    assert await roles.engine.generate(prompt(), 2, None) == [prompt()] * 2
    assert await roles.engine.prepare_weights(roles.actor, 3) == [3]
    await roles.engine.commit_weights(3)
    assert await roles.engine.logprobs([1, 2]) == [-1.0]
    assert await roles.actor.send_weights(3) == 3
    assert await roles.actor.logprobs([1, 2]) == [-1.0]
    assert await roles.reward.score(["r"]) == ("scored", ["r"])
    assert await roles.reference.score("b") == await roles.critic.score("b") == ("scored", "b")
    assert await roles.critic.update(None) == {"loss": 1.0}
    await roles.actor.save(None)
    assert await roles.actor.saved(True) is True
    await roles.actor.export(None)
    await roles.actor.load(None)
    times = timeline.end_step()
    assert times.seconds == {
        Phase.GENERATE: 1,
        Phase.REWARD: 1,
        Phase.SCORE: 2,
        Phase.UPDATE: 1,
        Phase.SYNC: 3,
        Phase.PROBE: 2,
        Phase.SAVE: 3,
        Phase.LOAD: 1,
    }
    assert times.driver_s == 0

    await roles.engine.health()
    await roles.engine.close()
    assert timeline.end_step().seconds == {}


def test_a_role_that_was_not_started_stays_none():
    roles = timed(Roles(actor=Ticking(None), engine=Ticking(None), reward=Ticking(None)), Timeline())
    assert roles.critic is None
    assert roles.reference is None
