"""Roles that share the engine's devices: never two sides awake at once, never a verb on a role asleep."""

import asyncio

import pytest

from orchestrator.roles import Residency
from orchestrator.turns import Turn, Turns, residency, taking_turns
from tests.fakes import FakeEngine, FakeLearner, FakeReward
from tests.test_loop import fake_roles, run, settings


class Devices:
    """What is on the shared devices; every move is seen."""

    def __init__(self):
        self.levels, self.moves = {}, []

    def put(self, name, level):
        self.levels[name] = level
        self.moves.append((name, level))
        awake = {n for n, at in self.levels.items() if at is Residency.AWAKE}
        assert awake <= {"engine"} or "engine" not in awake, f"together on one device: {awake}"


def on(devices, name, cls, **verbs):
    """A fake that resides on the devices and asserts the least level that each of its verbs needs."""

    class Living(cls):
        async def reside(self, level):
            await asyncio.sleep(0.001)
            devices.put(name, level)

    def checked(verb, least):
        async def call(self, *args):
            assert devices.levels.get(name, Residency.AWAKE) >= least, f"{name}.{verb} while asleep"
            answer = await getattr(cls, verb)(self, *args)
            assert devices.levels.get(name, Residency.AWAKE) >= least, f"{name} was moved during {verb}"
            return answer

        return call

    for verb, least in verbs.items():
        setattr(Living, verb, checked(verb, least))
    return Living()


def shared(devices):
    whole, weights = Residency.AWAKE, Residency.WEIGHTS
    return fake_roles(
        engine=on(
            devices, "engine", FakeEngine, generate=whole, logprobs=whole, prepare_weights=weights,
            commit_weights=weights,
        ),
        actor=on(
            devices, "actor", FakeLearner, update=whole, score_rollouts=whole, send_weights=weights,
            logprobs=weights,
        ),
        critic=on(devices, "critic", FakeLearner, update=whole, score_rollouts=whole),
        reward=on(devices, "reward", FakeReward, score=whole),
    )  # fmt: skip


def test_a_run_that_takes_turns_is_the_run_that_does_not():
    plain, alone = fake_roles(), run(settings(steps=6), fake_roles())
    devices = Devices()
    roles = taking_turns(shared(devices), frozenset({"engine", "actor", "critic", "reward"}))
    ledger, recorder = run(settings(steps=6), roles)
    assert ledger.history == alone[0].history
    assert recorder.metrics == alone[1].metrics
    assert type(roles.reference) is type(plain.reference)  # it has devices of its own


def test_a_step_moves_everybody_three_times():
    devices = Devices()
    run(settings(steps=2), taking_turns(shared(devices), frozenset({"engine", "actor"})))
    first_sync = [("engine", Residency.WEIGHTS), ("actor", Residency.WEIGHTS)]
    sample = [("actor", Residency.ASLEEP), ("engine", Residency.AWAKE)]
    train = [("engine", Residency.ASLEEP), ("actor", Residency.AWAKE)]
    sync = [("actor", Residency.WEIGHTS), ("engine", Residency.WEIGHTS)]
    moves = devices.moves
    assert sorted(moves[:2]) == sorted(first_sync)
    assert moves[2:14] == [*sample, *train, *sync] * 2


def test_only_weights_of_actor_and_engine_are_there_for_a_sync():
    levels = {role: residency(role, Turn.SYNC) for role in ("engine", "actor", "critic", "reference")}
    assert levels == {
        "engine": Residency.WEIGHTS,
        "actor": Residency.WEIGHTS,
        "critic": Residency.ASLEEP,
        "reference": Residency.ASLEEP,
    }


def test_a_move_that_failed_is_made_again_by_the_next_verb():
    class Clumsy:
        tries = 0

        async def reside(self, level):
            self.tries += 1
            if self.tries == 1:
                raise RuntimeError("out of memory")

    async def story():
        clumsy = Clumsy()
        turns = Turns({"actor": clumsy})
        with pytest.raises(RuntimeError, match="out of memory"):
            async with turns.turn(Turn.SAMPLE):
                pass
        async with turns.turn(Turn.SAMPLE):
            return clumsy.tries

    assert asyncio.run(story()) == 2
