"""Every role at many moments (FAULTS rows 1 to 11): `make chaos`."""

import signal
import time
from pathlib import Path

import pytest

from tests.chaos import driver_kills, kills
from tests.chaos.rig import rig


@pytest.mark.parametrize("who", ["engine", "engine child"])
@pytest.mark.parametrize(("number", "limit_s"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 15)])
def test_an_engine_is_lost_at_random_moments(tmp_path: Path, who: str, number: int, limit_s: float) -> None:
    assert kills.measure(tmp_path, who, number, moments=20)["most_seen_s"] < limit_s


def test_an_engine_that_takes_turns_on_shared_devices_is_lost(tmp_path: Path) -> None:
    share = "placement.share=[[engine,actor,critic,reward,reference]]"
    turns = ("placement.take_turns=true", share, "roles.actor.workers=1")
    report = kills.measure(tmp_path, "engine", signal.SIGKILL, moments=3, overrides=turns)
    assert report["steps_compared"] > 3


@pytest.mark.parametrize("who", ["actor", "critic"])
def test_a_trainer_rank_is_killed_at_random_moments(tmp_path: Path, who: str) -> None:
    assert kills.measure(tmp_path, who, signal.SIGKILL, moments=24)["most_works_s"] < 60


@pytest.mark.parametrize("who", ["reward", "reference"])
def test_a_frozen_role_is_killed_and_gives_the_same_scores(tmp_path: Path, who: str) -> None:
    assert kills.measure(tmp_path, who, signal.SIGKILL, moments=3)["most_seen_s"] < 1


def test_the_driver_is_killed_at_any_moment_and_the_end_is_bit_identical(tmp_path: Path) -> None:
    assert driver_kills.measure(tmp_path, moments=50)["most_steps_lost"] <= 1


def test_the_only_engine_in_a_crash_loop_ends_the_run_after_a_checkpoint(tmp_path: Path) -> None:
    with rig(
        tmp_path, "engine.replicas=1", "rl.steps=100000", "recovery.restarts=1", "rl.save_every=0"
    ) as run:
        run.start()
        run.until_step(1)
        run.strike("engine")
        run.until(lambda: run.incidents("recovered"))
        run.until_step(len(run.steps()) + 1)
        _, at = run.strike("engine")
        assert run.wait(60) == 75, run.log()
        assert time.monotonic() - at < 60
        assert list((run.run / "rl" / "checkpoints").glob("step-*"))
        run.check()


def test_a_driver_that_is_stopped_for_a_while_loses_nobody(tmp_path: Path) -> None:
    with rig(tmp_path, "engine.replicas=2", "rl.steps=100000") as run:
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
