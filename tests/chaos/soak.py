"""Random kills at a fixed seed: how much of the time is useful.

    python -m tests.chaos.soak FOLDER --minutes 20 --faults rollout

Useful time is what the steps that count would have taken undisturbed, by the pace before the first kill and
after the last; the share is of the time from the first kill's wait to the step after the last recovery.
"""

import argparse
import json
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from tests.chaos.rig import Rig, rig

VICTIMS = {
    "rollout": [("engine", 0), ("engine", 1), ("engine 0 child", 0), ("reward", 0)],
    "trainers": [("actor", 0)],
}
QUIET_S = 40.0  # for which the pace is measured


def pace(run: Rig) -> float:
    """Seconds from step to step, checkpoints included, while nobody dies."""
    run.until_step(len(run.steps()) + 1)
    first, began = len(run.steps()), time.monotonic()
    time.sleep(QUIET_S)
    run.until_step(len(run.steps()) + 1)
    return (time.monotonic() - began) / (len(run.steps()) - first)


def strike(run: Rig, faults: str, chance: random.Random, number: int) -> dict[str, Any]:
    """The ``number``-th victim has a successor."""
    role, rank = chance.choice(VICTIMS[faults])
    kind = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    _, at = run.strike(role, rank, kind)
    run.until(lambda: len(run.incidents("recovered")) >= number)
    return {"who": f"{role} {rank}", "signal": kind.name, "works_s": round(time.monotonic() - at, 1)}


def measure(folder: Path, faults: str, *, minutes: float, every: float, seed: int) -> dict[str, Any]:
    chance, kills = random.Random(seed), []
    with rig(folder, "engine.replicas=2", "rl.steps=1000000", "rl.samples_every=0") as run:
        run.start()
        run.until_step(2)
        quiet = [pace(run)]
        first, began = len(run.steps()), time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            time.sleep(chance.expovariate(1 / every))
            kills.append(strike(run, faults, chance, len(kills) + 1))
            print(json.dumps(kills[-1]), flush=True)
        run.until_step(len(run.steps()) + 1)
        done, seconds = len(run.steps()) - first, time.monotonic() - began
        quiet.append(pace(run))
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 75, run.log()
        run.check()
    return {
        "faults": faults, "minutes": round(seconds / 60, 1), "kills": len(kills), "steps": done,
        "quiet_step_s": [round(one, 3) for one in quiet],
        "useful_share": round(done * statistics.mean(quiet) / seconds, 3), "each": kills,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--faults", choices=[*VICTIMS], default="rollout")
    parser.add_argument("--every", type=float, default=60, help="seconds between kills, in the mean")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = measure(
        options.folder, options.faults, minutes=options.minutes, every=options.every, seed=options.seed
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
