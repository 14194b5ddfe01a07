"""One run that is left alone, and the same one with the engine, a trainer and the driver killed: the same
batches, losses and weights."""

import hashlib
from pathlib import Path

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


def test_engine_trainer_and_driver_are_killed_and_the_run_ends_as_if_nothing_had_happened(
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

        run.until_step(2)
        engine = run.pid("engine")
        run.strike("actor")
        run.until(lambda: run.incidents("rolled back"))
        assert (driver, engine) == (run.pid("driver"), run.pid("engine"))

        run.until_step(3)
        run.strike("driver")
        run.wait()
        run.check_hygiene(20, agents=False)
        run.finish("--resume")
        run.check()
        assert_same(run, golden)
