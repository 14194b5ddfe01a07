"""One run that is left alone, and the same one with an engine killed, an engine stopped, a trainer killed and
the driver killed: the same batches, losses and weights."""

import hashlib
import signal
from pathlib import Path

import psutil
import pytest

from tests.chaos.rig import Rig, rig

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
RUN = ("engine.replicas=1", "rl.steps=5")  # with one engine the run waits for its successor


def weights(run: Rig) -> str:
    """Of the exported policy."""
    return hashlib.sha256((run.run / "model" / "model.safetensors").read_bytes()).hexdigest()


def assert_same(run: Rig, golden: Rig) -> None:
    assert run.responses() == golden.responses()
    losses = [[step["actor/loss"] for step in each.steps()] for each in (run, golden)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert weights(run) == weights(golden)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    with rig(tmp_path_factory.mktemp("golden"), *RUN) as run:
        run.finish()
        run.check()
    return run


def test_engines_and_trainers_die_and_stop_and_the_run_ends_as_if_nothing_had_happened(
    golden: Rig, tmp_path: Path
) -> None:
    with rig(tmp_path, *RUN) as run:
        run.start()
        run.until_step(1)
        driver = run.pid("driver")
        _, killed = run.strike("engine")
        lost = run.until(lambda: run.incidents("lost"))
        assert lost[0]["monotonic_s"] - killed < 1 and lost[0]["who"] == "engine 0"
        run.until(lambda: run.incidents("recovered"))

        stopped, at = run.strike("engine", number=signal.SIGSTOP)
        lost = run.until(lambda: run.incidents("lost")[1:])
        assert lost[0]["monotonic_s"] - at < 15 and "no sign of life" in lost[0]["detail"]
        run.until(lambda: not psutil.pid_exists(stopped))
        assert list((run.run / "stacks").iterdir())

        run.until(lambda: run.incidents("recovered")[1:])

        run.strike("actor")
        run.until(lambda: run.incidents("rolled back"))
        assert run.pid("driver") == driver
        assert run.wait() == 0, run.log()
        run.check()
        assert_same(run, golden)


def test_a_killed_driver_leaves_nothing_behind_and_its_resume_ends_bit_identical(
    golden: Rig, tmp_path: Path
) -> None:
    with rig(tmp_path, *RUN) as run:
        run.start()
        run.until_step(2)
        run.strike("driver")
        run.wait()
        run.check_hygiene(20)
        run.finish("--resume")
        run.check()
        assert_same(run, golden)
