"""Random kills at a fixed seed: how much of the time is useful.

    python -m tests.chaos.soak FOLDER --minutes 20 --faults rollout

Useful time is what the steps that count would have taken undisturbed; the share is of the time from the first
kill's wait to the step after the last recovery. The pace is that of all steps of the run in which nobody was
dead or starting again: before the first kill, between them, and after the last, for a machine that others use
too changes it within minutes.
"""

import argparse
import json
import random
import signal
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.chaos.rig import Rig, rig

VICTIMS = {
    "rollout": [("engine", 0), ("engine", 1), ("engine 0 child", 0), ("reward", 0)],
    "trainers": [("actor", 0)],
}
QUIET_S = 40.0  # before the first kill and after the last


def strike(run: Rig, faults: str, chance: random.Random, number: int) -> dict[str, Any]:
    """The ``number``-th victim has a successor, and a step has been done since."""
    role, rank = chance.choice(VICTIMS[faults])
    kind = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    struck = time.time()
    _, at = run.strike(role, rank, kind)
    run.until(lambda: len(run.incidents("recovered")) >= number)
    works_s = round(time.monotonic() - at, 1)
    run.until_step(len(run.steps()) + 1)
    return {
        "who": f"{role} {rank}", "signal": kind.name, "works_s": works_s, "between": (struck, time.time()),
    }  # fmt: skip


def quiet_gaps(ends: Sequence[float], disturbed: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds from step to step, checkpoints included, of those that no disturbance touches.

    Example: steps that end at 1, 2, 4, 9, 10 and a disturbance from 3.5 to 8: 1, 1.
    """
    return [
        end - begin
        for begin, end in pairwise(ends)
        if not any(begin < until and since < end for since, until in disturbed)
    ]


def measure(folder: Path, faults: str, *, minutes: float, every: float, seed: int) -> dict[str, Any]:
    chance, kills = random.Random(seed), []
    with rig(folder, "engine.replicas=2", "rl.steps=1000000", "rl.samples_every=0") as run:
        run.start()
        run.until_step(3)
        warm = time.time()
        time.sleep(QUIET_S)
        first, began = len(run.steps()), time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            time.sleep(chance.expovariate(1 / every))
            kills.append(strike(run, faults, chance, len(kills) + 1))
            print(json.dumps(kills[-1]), flush=True)
        done, seconds = len(run.steps()) - first, time.monotonic() - began
        time.sleep(QUIET_S)
        ends = sorted(step["time"] for step in run.steps() if step["time"] > warm)
        quiet = quiet_gaps(ends, [one.pop("between") for one in kills])
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 75, run.log()
        run.check()
    return {
        "faults": faults, "minutes": round(seconds / 60, 1), "kills": len(kills), "steps": done,
        "quiet_step_s": round(statistics.mean(quiet), 3), "quiet_steps": len(quiet),
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
