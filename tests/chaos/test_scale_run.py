"""An engine is called into a run at work, which sends it away by itself: each prompt is trained on once, and
nothing is left."""

import json
from pathlib import Path

import pytest

from launch.cli import main
from tests.chaos.rig import rig

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
STEPS = 400  # never reached: the run is stopped


AUTOSCALE = "engine.autoscale={max: 2, target_wait: 0.9, window: 3}"  # one engine is enough for that


def test_an_engine_joins_a_run_at_work_serves_and_leaves(tmp_path: Path) -> None:
    with rig(tmp_path, AUTOSCALE, f"rl.steps={STEPS}", "rl.staleness=1", "rl.save_every=0") as run:
        run.start()
        run.until_step(1)
        assert main(["scale", str(run.run), "engine=2"]) == 0
        run.until(lambda: "2 engine(s), as" in run.log())
        joined = len(run.steps())
        assert {line["rank"] for line in run.roster() if line["role"] == "engine"} == {0, 1}
        run.until(lambda: "1 engine(s), as engine.autoscale asked" in run.log())
        assert len(run.steps()) >= joined + 3
        decided = [step for step in run.steps() if "engines_wanted" in step]
        assert [(step["engines"], step["engines_wanted"]) for step in decided] == [(2, 1)]
        assert [line["rank"] for line in run.roster() if line["role"] == "engine"] == [0]
        run.until_step(len(run.steps()) + 2)
        run.process.terminate()  # stops after the step, with a checkpoint
        run.wait()
        run.check()
        versions = [step["probe_diff"] for step in run.steps()]
    assert max(versions) < 1e-3
    spans = json.loads((run.run / "trace.json").read_text())
    events = spans["traceEvents"] if isinstance(spans, dict) else spans
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert any(names.get(event["tid"]) == "engine 1" and event["name"] == "generate" for event in events)
