"""engine.autoscale: what is decided from shares worked by hand, and a fleet that follows it up and down."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from actors.elastic_fleet import ElasticFleet
from launch.autoscaling import Autoscaling
from launch.cluster import PlacementError
from launch.engine_count import EngineCount
from launch.scale import BY_ITSELF, Wish, asked
from orchestrator.autoscale import Autoscaler, Shares
from orchestrator.config import Autoscale
from tests.test_config import load, refusal
from tests.test_fleet import FakeEngine


def measured(engines: int, *, generation: float, training: float, overlaps: bool = True) -> Shares:
    """Of a step in which one engine would generate for ``generation`` seconds and the trainers work for
    ``training``: side by side, or (not ``overlaps``) one after the other."""
    generates = generation / engines
    step = max(generates, training) if overlaps else generates + training
    return Shares(wait=(step - training) / step, busy=generates / step, idle=1 - generates / step)


def decided(scaler: Autoscaler, engines: int | None, shares: Shares, *, steps: int) -> list[int | None]:
    decisions = [scaler.stepped(engines, shares) for _ in range(steps)]
    return [decision and decision.engines for decision in decisions]


def scaler(*, overlaps: bool = True, **settings: float) -> Autoscaler:
    fields = {"min": 1, "max": 4, "target_wait": 0.1, "window": 3} | settings
    return Autoscaler(Autoscale(**fields), overlaps=overlaps)


def test_too_long_a_wait_asks_for_one_more_and_then_for_none_until_the_window_is_full_again() -> None:
    twelve_against_five = measured(1, generation=12, training=5)
    assert twelve_against_five == Shares(wait=7 / 12, busy=1, idle=0)
    one = scaler()
    # The first step may have begun with other engines; three are counted; the fifth is the first of the next.
    assert decided(one, 1, twelve_against_five, steps=7) == [None, None, None, 2, None, None, 2]
    assert decided(one, 2, measured(2, generation=12, training=5), steps=4) == [None, None, None, 3]
    assert decided(one, 3, measured(3, generation=12, training=5), steps=9) == [None] * 9


def test_one_engine_fewer_makes_the_others_longer_where_their_idle_time_does_not_hold_it() -> None:
    two = Shares(wait=0.0, busy=0.4, idle=0.6)
    assert two.one_engine_fewer(2, overlaps=True) == 0  # one is busy for 0.8 then
    assert two.one_engine_fewer(2, overlaps=False) == pytest.approx(0.4 / 1.4)
    # 10 s over two engines, then 15 s of training: 5 of 20 s; with one engine 10 of 25 s.
    turns = measured(2, generation=10, training=15, overlaps=False)
    assert turns.wait == 0.25
    assert turns.one_engine_fewer(2, overlaps=False) == pytest.approx(10 / 25)


def test_idle_engines_leave_one_at_a_time_down_to_the_fewest() -> None:
    idle = scaler(min=2)
    assert decided(idle, 4, measured(4, generation=4, training=5), steps=4)[-1] == 3
    assert decided(idle, 3, measured(3, generation=4, training=5), steps=4)[-1] == 2
    assert decided(idle, 2, measured(2, generation=4, training=5), steps=9) == [None] * 9


@pytest.mark.parametrize(("wait", "wanted"), [(0.14, None), (0.16, 3)])
def test_between_the_target_and_its_tolerance_nothing_happens(wait: float, wanted: int | None) -> None:
    shares = Shares(wait=wait, busy=0.8, idle=0.1)  # one fewer would wait (0.14 + 0.7) / 1.7
    assert decided(scaler(), 2, shares, steps=4)[-1] == wanted


def test_a_synchronous_run_finds_its_target_and_stays() -> None:
    # 12 s on one engine, 8 s of training: it waits 12/20, 6/14, 4/12, 3/11 of a step.
    for engines, wanted in [(1, 2), (2, 3), (3, None), (4, 3)]:
        shares = measured(engines, generation=12, training=8, overlaps=False)
        assert decided(scaler(overlaps=False, target_wait=0.35), engines, shares, steps=4)[-1] == wanted


def test_one_slow_step_is_no_reason() -> None:
    quiet, slow = Shares(wait=0.1, busy=0.9, idle=0.1), Shares(wait=0.9, busy=0.9, idle=0.1)
    steady = scaler()
    assert [steady.stepped(2, shares) for shares in (quiet, quiet, slow, quiet, quiet, slow)] == [None] * 6


def test_no_more_than_the_most_and_steps_in_which_engines_come_and_go_do_not_count() -> None:
    waits = Shares(wait=0.5, busy=1, idle=0)
    assert decided(scaler(), 4, waits, steps=9) == [None] * 9
    changing = scaler()
    assert decided(changing, 2, waits, steps=3) == [None] * 3
    assert decided(changing, None, waits, steps=9) == [None] * 9
    assert decided(changing, 2, waits, steps=4) == [None, None, None, 3]


def test_an_engine_that_has_no_restarts_left_is_made_up_for() -> None:
    assert decided(scaler(min=2), 1, Shares(wait=0, busy=0.5, idle=0.5), steps=4)[-1] == 2


def test_bounds_that_cannot_be_are_refused() -> None:
    base = ["engine.autoscale.max=4"]
    assert load(*base).engine.autoscale == Autoscale(max=4)
    assert "engine.autoscale.min=5 is more than engine.autoscale.max=4; swap them" in refusal(
        *base, "engine.autoscale.min=5"
    )
    assert "engine.replicas=1 is not within engine.autoscale.min=2 and max=4; start with" in refusal(
        *base, "engine.autoscale.min=2"
    )
    assert "the engines live on devices of which there are no more" in refusal(
        *base, "placement.share=[[actor, engine]]"
    )
    assert "engine.autoscale.target_wait" in refusal(*base, "engine.autoscale.target_wait=1")


# a fleet that follows


class JoiningEngine(FakeEngine):
    async def start(self) -> None:
        await asyncio.sleep(0.01)


class Devices:
    """A cluster with room for a number of engines; a seat is a number."""

    def __init__(self, free: int) -> None:
        self.free = free

    async def one_more_engine(self) -> tuple[str, str]:
        if not self.free:
            raise PlacementError("no device is free")
        self.free -= 1
        return "seat", "group"

    def give_back(self, group: str) -> bool:
        self.free += 1
        return True

    def forget_engine(self, index: int) -> None:
        pass


class Scaled:
    """A run with one engine to begin with, whose steps take what ``measured`` says."""

    def __init__(self, folder, devices: Devices) -> None:
        self.run = load(
            f"run_dir={folder}", "rl.staleness=1", "engine.autoscale={max: 3, target_wait: 0.1, window: 3}"
        )
        first = JoiningEngine(open=True)
        self.fleet = ElasticFleet([first], run_seed=3, workers=2, restarts=3)
        self.notes: list[str] = []
        spawn = lambda seat, group, index: JoiningEngine(open=True)  # noqa: E731
        self.count = EngineCount(self.run, devices, self.fleet, spawn, {first: ("seat", "own")})
        self.scaling = Autoscaling(
            self.run.engine.autoscale, self.count, self.notes.append, overlaps=self.run.rl.staleness > 0
        )

    @asynccontextmanager
    async def followed(self):
        following = asyncio.create_task(self.count.follow(self.notes.append))
        try:
            yield
        finally:
            following.cancel()

    async def steps(self, number: int, *, generation: float, training: float) -> list[float]:
        """The engines at the end of each."""
        seen = []
        for _ in range(number):
            shares = measured(self.fleet.size, generation=generation, training=training)
            figures = self.scaling.stepped(
                {"trainer_wait": shares.wait, "engine_busy": shares.busy, "engine_idle": shares.idle}
            )
            seen.append(figures["engines"])
            await asyncio.sleep(0.03)
        return seen


async def test_a_run_gets_the_engines_it_waits_for_and_gives_them_back(tmp_path) -> None:
    run = Scaled(tmp_path, Devices(free=2))
    async with run.followed():
        # One engine is counted for three steps after the first; then two; then three, at which it stays.
        assert await run.steps(14, generation=12, training=5) == [1] * 4 + [2] * 4 + [3] * 6
        assert asked(run.run, tmp_path) == Wish(engines=3, by=BY_ITSELF)
        assert run.notes[:2] == [
            "engine.autoscale: 2 engine(s) instead of 1: in the last 3 steps the trainers waited 58% of the "
            "time for generation (target 10%), the engines were idle 0%",
            "2 engine(s), as engine.autoscale asked",
        ]
        # The answers get shorter. The window holds steps of before until their median is one of after.
        assert (await run.steps(12, generation=4, training=5))[-1] == 1
    assert run.fleet.size == 1 and len(run.notes) == 8
    resumed = Scaled(tmp_path, Devices(free=2))
    async with resumed.followed():  # starts with engine.replicas and goes on with what was asked last
        await asyncio.sleep(0.05)
    assert (resumed.fleet.size, resumed.notes) == (1, ["1 engine(s), as engine.autoscale asked"])


async def test_devices_that_are_not_there_are_spoken_of_once_and_asked_for_again(tmp_path) -> None:
    devices = Devices(free=0)
    run = Scaled(tmp_path, devices)
    async with run.followed():
        assert await run.steps(9, generation=12, training=5) == [1] * 9
        warnings = [note for note in run.notes if note.startswith("WARNING")]
        assert warnings == ["WARNING: 1 engine(s) and not 2: no device is free"]
        assert asked(run.run, tmp_path) == Wish(engines=1, by=BY_ITSELF)
        devices.free = 1
        assert (await run.steps(8, generation=12, training=5))[-1] == 2
