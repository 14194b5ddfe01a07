"""Every role at many moments (FAULTS rows 1 to 11): `make chaos`."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.rig import Rig, rig
from tests.chaos.test_quick import assert_same

KILLS = 20


def steady(folder: Path, *overrides: str) -> "rig":
    """Many steps, so that there is always one to disturb."""
    return rig(folder, "engine.replicas=2", "rl.steps=100000", *overrides)


def wait_recovered(run: Rig, count: int) -> None:
    run.until(lambda: len(run.incidents("recovered")) >= count)


@pytest.mark.parametrize("victim", ["engine", "engine child"])
@pytest.mark.parametrize(("number", "limit_s"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 15)])
def test_an_engine_is_lost_at_random_moments(
    tmp_path: Path, victim: str, number: int, limit_s: float
) -> None:
    chance = random.Random(1)
    with steady(tmp_path) as run:
        run.start()
        run.until_step(1)
        times = []
        for kill in range(KILLS):
            time.sleep(chance.random())
            index = chance.randrange(2)
            role, rank = ("engine", index) if victim == "engine" else (f"engine {index} child", 0)
            pid, at = run.strike(role, rank, number)
            lost = run.until(lambda n=kill: run.incidents("lost")[n:])[0]
            times.append(lost["monotonic_s"] - at)
            run.until(lambda pid=pid: not psutil.pid_exists(pid))
            wait_recovered(run, kill + 1)
            run.until_step(len(run.steps()) + 1)
        print(f"{victim} {number}: {KILLS} of {KILLS}, detected within {max(times):.2f} s")
        assert max(times) < limit_s
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 75, run.log()
        run.check()


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_trainer_rank_is_killed_at_random_moments(tmp_path: Path, role: str) -> None:
    chance = random.Random(2)
    ranks = 2 if role == "actor" else 1
    with steady(tmp_path, "roles.actor.workers=2", "rl.algorithm.name=ppo", "rl.staleness=0") as run:
        run.start()
        run.until_step(1)
        driver, engines = run.pid("driver"), [run.pid("engine", k) for k in range(2)]
        times = []
        for kill in range(12):
            time.sleep(2 * chance.random())
            _, at = run.strike(role, chance.randrange(ranks))
            run.until(lambda n=kill: run.incidents("rolled back")[n:])
            run.until_step(len(run.steps()) + 1)
            times.append(time.monotonic() - at)
        print(f"{role}: recovered within {max(times):.1f} s")
        assert max(times) < 60
        assert (driver, engines) == (run.pid("driver"), [run.pid("engine", k) for k in range(2)])
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 75, run.log()
        run.check()


@pytest.mark.parametrize("role", ["reward", "reference"])
def test_a_frozen_role_is_killed_and_gives_the_same_scores(tmp_path: Path, role: str) -> None:
    overrides = ("engine.replicas=1", "rl.steps=6", "rl.algorithm.kl_coef=0.1")
    with rig(tmp_path / "a", *overrides) as golden, rig(tmp_path / "b", *overrides) as run:
        golden.finish()
        run.start()
        run.until_step(2)
        run.strike(role)
        wait_recovered(run, 1)
        assert run.wait() == 0, run.log()
        run.check()
        assert_same(run, golden)


def test_the_only_engine_in_a_crash_loop_ends_the_run_after_a_checkpoint(tmp_path: Path) -> None:
    with steady(tmp_path, "engine.replicas=1", "recovery.restarts=1", "rl.save_every=0") as run:
        run.start()
        run.until_step(1)
        run.strike("engine")
        wait_recovered(run, 1)
        run.until_step(len(run.steps()) + 1)
        _, at = run.strike("engine")
        assert run.wait(60) == 75, run.log()
        assert time.monotonic() - at < 60
        assert list((run.run / "rl" / "checkpoints").glob("step-*"))
        run.check()


@pytest.mark.parametrize("seed", range(50))
def test_the_driver_is_killed_at_any_moment_and_the_end_is_bit_identical(
    tmp_path: Path, golden_of_one: Rig, seed: int
) -> None:
    with rig(tmp_path, "engine.replicas=1", "rl.steps=4") as run:
        run.start()
        run.until(lambda: (run.run / "roster.json").exists())
        time.sleep(random.Random(seed).uniform(0, 30))
        if run.process.poll() is None:
            run.process.kill()
        run.wait()
        run.check_hygiene(20)
        run.finish("--resume")
        run.check()
        assert_same(run, golden_of_one)


@pytest.fixture(scope="module")
def golden_of_one(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    with rig(tmp_path_factory.mktemp("golden"), "engine.replicas=1", "rl.steps=4") as run:
        run.finish()
    return run


def test_a_driver_that_is_stopped_for_a_while_loses_nobody(tmp_path: Path) -> None:
    with steady(tmp_path) as run:
        run.start()
        run.until_step(1)
        run.strike("driver", number=signal.SIGSTOP)
        time.sleep(30)
        run.strike("driver", number=signal.SIGCONT)
        run.until_step(len(run.steps()) + 3)
        assert run.incidents("lost") == []
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 75
        run.check()
