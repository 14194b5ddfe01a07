"""Random kills at a fixed seed: how much of the time is useful.

    python -m tests.chaos.soak FOLDER --minutes 20 --faults rollout

Useful time is what the steps that count would have taken undisturbed (the median step before the first kill);
the share is of the time from the first step to the last.
"""

import argparse
import json
import random
import signal
import statistics
import time
from pathlib import Path

from tests.chaos.rig import rig

VICTIMS = {
    "rollout": [("engine", 0), ("engine", 1), ("engine 0 child", 0), ("reward", 0)],
    "trainer": [("actor", 0)],
}
QUIET_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--faults", choices=[*VICTIMS], default="rollout")
    parser.add_argument("--every", type=float, default=60, help="seconds between kills, in the mean")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, kills = random.Random(options.seed), 0
    options.folder.mkdir(parents=True)
    with rig(options.folder, "engine.replicas=2", "rl.steps=1000000", "rl.samples_every=0") as run:
        run.start()
        run.until_step(QUIET_STEPS)
        quiet = statistics.median(step["step_s"] for step in run.steps())
        first, began = len(run.steps()), time.monotonic()
        while time.monotonic() - began < 60 * options.minutes:
            time.sleep(chance.expovariate(1 / options.every))
            role, rank = chance.choice(VICTIMS[options.faults])
            run.strike(role, rank, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
            kills += 1
            run.until(lambda: len(run.incidents("recovered")) >= kills)  # noqa: B023 - it waits here
        run.until_step(len(run.steps()) + 1)
        done, seconds = len(run.steps()) - first, time.monotonic() - began
        run.process.send_signal(signal.SIGTERM)
        run.wait()
        run.check()
    share = done * quiet / seconds
    print(json.dumps({"kills": kills, "steps": done, "quiet_step_s": quiet, "useful_share": share}))


if __name__ == "__main__":
    main()
