"""The driver is killed at random moments of one run and resumed; it must end as if it had been left alone.

    python -m tests.chaos.driver_kills FOLDER --moments 50
    python -m tests.chaos.driver_kills FOLDER --moments 10 --seed 1     # a part; all share the run left alone

Every other moment lies in the seconds after training began again, the rest anywhere from the start on. Prints
how many steps each kill cost; fails unless batches, losses and weights are those of the run that was left
alone, the weights bit for bit.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from tests.chaos.rig import Rig, rig
from tests.chaos.test_quick import assert_same

STEPS_PER_KILL = 3
ALL_STEPS_S = 1800.0
TRAINING_S, STARTING_S = 3.0, 20.0  # from which moments are drawn


def checkpointed(run: Rig) -> int:
    """The step of the newest checkpoint."""
    steps = (run.run / "rl" / "checkpoints").glob("step-*")
    return max((int(path.name.removeprefix("step-").rstrip("+")) for path in steps), default=0)


def kill(run: Rig, chance: random.Random) -> dict[str, float]:
    """Ends the driver; what was lost."""
    began, before = time.monotonic(), len(run.lines("metrics.jsonl"))
    if chance.random() < 0.5:
        run.until(lambda: len(run.lines("metrics.jsonl")) > before or run.process.poll() is not None, 240)
        time.sleep(chance.uniform(0, TRAINING_S))
    else:
        time.sleep(chance.uniform(0, STARTING_S))
        run.look()
    run.process.kill()
    run.process.wait()
    done = max((line["step"] for line in run.lines("metrics.jsonl")), default=0)
    drafts = list((run.run / "rl" / "checkpoints").glob("tmp-*"))
    run.check_hygiene(60, agents=False)
    return {
        "after_s": round(time.monotonic() - began, 1), "steps_lost": done - checkpointed(run),
        "in_a_save": bool(drafts),
    }  # fmt: skip


def measure(folder: Path, *, moments: int, seed: int = 0) -> dict[str, Any]:
    chance = random.Random(seed)
    overrides = ("engine.replicas=1", f"rl.steps={STEPS_PER_KILL * moments}")
    kills: list[dict[str, float]] = []
    with rig(folder / "golden", *overrides) as golden, rig(folder / f"run-{seed}", *overrides) as run:
        if not (golden.run / "model").exists():
            golden.start()
            assert golden.wait(ALL_STEPS_S) == 0, golden.log()
        run.start()
        while len(kills) < moments and run.process.poll() is None:
            kills.append(kill(run, chance))
            print(json.dumps(kills[-1]), flush=True)
            run.start("--resume")
        assert run.wait(ALL_STEPS_S) == 0, run.log()
        run.check()
        assert_same(run, golden)
    lost = [one["steps_lost"] for one in kills]
    return {"kills": len(kills), "most_steps_lost": max(lost), "bit_identical": True, "each": kills}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, moments=options.moments, seed=options.seed)))


if __name__ == "__main__":
    main()
