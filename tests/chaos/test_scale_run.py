"""A run at work calls an engine in, and sends it away, by how long its trainers wait: each prompt is trained
on once, and nothing is left."""

import json
from pathlib import Path

import pytest

from launch.graceful import CHECKPOINTED
from tests.chaos.rig import Rig, rig

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
FIELDS = ("rl.steps=400", "rl.staleness=1", "rl.save_every=0")  # the run is stopped
AUTOSCALE = "engine.autoscale={max: 2, target_wait: 0.05, window: 3}"  # one engine is too few for that
CONTENT = "engine.autoscale.target_wait=0.9"  # one is enough


def test_an_engine_joins_a_run_at_work_serves_and_leaves(tmp_path: Path) -> None:
    with rig(tmp_path, AUTOSCALE, *FIELDS) as run:
        run.start()
        run.until(lambda: "2 engine(s), as engine.autoscale asked" in run.log())
        assert ranks(run) == {0, 1}
        run.until_step(len(run.steps()) + 3)
        run.process.terminate()  # stops after the step, with a checkpoint
        assert run.wait() == CHECKPOINTED, run.log()
        assert decisions(run) == [(1, 2)]
        waited = [step["trainer_wait"] for step in run.steps()]

        run.start("--resume", CONTENT)  # with the engines that were asked for last
        run.until(lambda: "1 engine(s), as engine.autoscale asked" in run.log())
        assert ranks(run) == {0}
        run.until_step(len(run.steps()) + 2)
        run.process.terminate()
        assert run.wait() == CHECKPOINTED, run.log()
        assert decisions(run) == [(1, 2), (2, 1)]
        run.check()
        assert max(step["probe_diff"] for step in run.steps()) < 1e-3
    print(f"trainer_wait of the first part: {waited}")
    events = json.loads((run.run / "trace.json").read_text())
    seats = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    served = {e["pid"] for e in events if e["name"] == "generate" and seats[e["pid"], e["tid"]] == "engine 1"}
    assert served == {1, 2}  # in both parts


def ranks(run: Rig) -> set[int]:
    return {line["rank"] for line in run.roster() if line["role"] == "engine"}


def decisions(run: Rig) -> list[tuple[float, float]]:
    return [(step["engines"], step["engines_wanted"]) for step in run.steps() if "engines_wanted" in step]
