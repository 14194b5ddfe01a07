"""Roles that share the engine's devices: never two sides awake at once, never a verb on a role asleep."""

import asyncio

import pytest

from actors.errors import WorkerLost
from actors.fleet import EngineFleet
from orchestrator.roles import Residency, WeightReceipt
from orchestrator.turns import Turn, Turns, residency, taking_turns
from tests.fakes import FakeEngine, FakeLearner, FakeReward, rollout
from tests.test_loop import fake_roles, run, settings


class Devices:
    """What is on the shared devices; every move is seen."""

    def __init__(self):
        self.levels, self.moves = {}, []

    def put(self, name, level):
        self.levels[name] = level
        self.moves.append((name, level))
        awake = {n for n, at in self.levels.items() if at is Residency.AWAKE}
        engines = {n for n in awake if n.startswith("engine")}
        assert not engines or awake == engines, f"together on one device: {awake}"


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


class FakeActor(FakeLearner):
    async def open_channel(self, num_receivers):
        return None


def shared(devices, **changes):
    whole, weights = Residency.AWAKE, Residency.WEIGHTS
    engine = on(
        devices, "engine", FakeEngine, generate=whole, logprobs=whole, prepare_weights=weights,
        commit_weights=weights,
    )  # fmt: skip
    return fake_roles(
        **{"engine": engine} | changes,
        actor=on(
            devices, "actor", FakeActor, update=whole, score_rollouts=whole, send_weights=weights,
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
        turns = Turns()
        turns.admit({"actor": clumsy})
        with pytest.raises(RuntimeError, match="out of memory"):
            async with turns.turn(Turn.SAMPLE):
                pass
        async with turns.turn(Turn.SAMPLE):
            return clumsy.tries

    assert asyncio.run(story()) == 2


class Mortal:
    """One engine of a fleet, with the verbs of ``fleet.EngineHandle``; its process dies in the call
    number ``calls`` of ``dies_in``."""

    def __init__(self, devices, index):
        self.devices, self.name, self.dies_in, self.calls = devices, f"engine {index}", None, 0
        self.alive, self.lives, self.version = True, 1, -1

    async def ask(self, verb, least):
        self.calls -= verb == self.dies_in
        if verb == self.dies_in and self.calls == 0:
            self.alive = False
            self.devices.levels.pop(self.name, None)  # a dead process holds nothing
        if not self.alive:
            raise WorkerLost(f"died in {verb}")
        assert self.devices.levels.get(self.name, Residency.AWAKE) >= least, f"{verb} while asleep"
        await asyncio.sleep(0.001)

    async def generate(self, prompt, num_samples, sampling, seeds):
        await self.ask("generate", Residency.AWAKE)
        return [rollout(prompt, k, version=self.version) for k in range(num_samples)]

    async def logprobs(self, tokens):
        await self.ask("logprobs", Residency.AWAKE)
        return [-1.0] * (len(tokens) - 1)

    async def join_weights(self, address, rank_offset):
        await self.ask("join_weights", Residency.WEIGHTS)

    async def receive_weights(self, version):
        await self.ask("receive_weights", Residency.WEIGHTS)
        self.version = version
        return [WeightReceipt(version=version, checksums={"w": 7}, who="engine 0", num_bytes=4)]

    async def commit_weights(self, version):
        await self.ask("commit_weights", Residency.WEIGHTS)

    async def reside(self, level):
        await self.ask("reside", Residency.ASLEEP)
        self.devices.put(self.name, level)

    async def restart(self):
        """The successor needs the devices for itself, and is awake when it has them."""
        others = {name: level for name, level in self.devices.levels.items() if not name.startswith("engine")}
        assert len(others) == 3 and set(others.values()) == {Residency.ASLEEP}
        await asyncio.sleep(0.005)
        self.devices.put(self.name, Residency.AWAKE)
        self.alive, self.lives, self.version = True, self.lives + 1, 0


@pytest.mark.parametrize("num_engines", [1, 2])
@pytest.mark.parametrize(
    ("verb", "call"),
    [("generate", 3), ("logprobs", 2), ("join_weights", 1), ("receive_weights", 3), ("commit_weights", 2),
     ("reside", 2), ("reside", 3), ("reside", 4)],
)  # fmt: skip
def test_an_engine_that_dies_at_any_turn_is_replaced_and_the_run_is_the_run_left_alone(
    num_engines, verb, call
):
    """Its successor starts while the others sleep, and gets its weights in a turn of its own."""
    alone = run(settings(steps=6), fake_roles())
    devices, turns = Devices(), Turns()
    doomed, *rest = engines = [Mortal(devices, k) for k in range(num_engines)]
    doomed.dies_in, doomed.calls = verb, call
    fleet = EngineFleet(engines, run_seed=3, restarts=1, turn=turns.turn)
    names = frozenset({"engine", "actor", "critic", "reward"})
    roles = taking_turns(shared(devices, engine=fleet), names, turns)
    ledger, recorder = run(settings(steps=6), roles)
    assert ledger.history == alone[0].history
    left = [{k: v for k, v in step.items() if k != "sync_mb"} for step in alone[1].metrics]
    assert [{k: v for k, v in step.items() if k != "sync_mb"} for step in recorder.metrics] == left
    assert doomed.lives == 2 and all(engine.lives == 1 for engine in rest)
    assert {engine.version for engine in engines} <= {5, 6}
