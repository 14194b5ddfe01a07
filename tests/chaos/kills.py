"""One role is killed or stopped at random moments of a run, again and again; nothing else may change.

    python -m tests.chaos.kills FOLDER --who engine --moments 20
    python -m tests.chaos.kills FOLDER --who engine --signal STOP
    python -m tests.chaos.kills FOLDER --who actor --moments 24

Prints how soon each loss was seen, in which verbs the victim was, and how long it took until the next step
was done. Then the same run is left alone for as many steps, at most MOST_COMPARED: batches and losses must be
the same. Driver, and who was not struck, must be the processes that they were.
"""

import argparse
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.rig import Rig, rig

VICTIMS = {
    "engine": [("engine", 0)],
    "engine child": [("engine 0 child", 0)],
    "reward": [("reward", 0)],
    "reference": [("reference", 0)],
    "actor": [("actor", 0), ("actor", 1)],
    "critic": [("critic", 0)],
}
TRAINERS = ("actor", "critic")
WITHIN_S = 2.0  # of the step before: moments are drawn from these
MOST_COMPARED = 100
SETTINGS = ("engine.replicas=1", "rl.steps=100000", "rl.algorithm.name=ppo", "rl.algorithm.kl_coef=0.1",
            "roles.actor.workers=2")  # fmt: skip
# Of a trainer: short responses and many updates, so that it is in a call most of the time.
BUSY_TRAINERS = ("rl.sampling.max_new_tokens=24", "rl.updates.epochs=6")


def strike(run: Rig, who: str, number: int, chance: random.Random) -> dict[str, Any]:
    """The victim is gone, and the run has done another step."""
    role, rank = chance.choice(VICTIMS[who])
    pid, at = run.strike(role, rank, number)

    def since(kind: str) -> list[dict[str, Any]]:
        return [line for line in run.incidents(kind) if line["monotonic_s"] >= at]

    lost = run.until(lambda: since("lost"))[0]
    run.until(lambda: not psutil.pid_exists(pid))
    run.until(lambda: since("rolled back" if who in TRAINERS else "recovered"))
    run.until_step(len(run.steps()) + 1)
    verbs = re.search(r"(?:died|it was) in ([\w ,]+)", lost["detail"])
    return {
        "in": verbs[1].removesuffix(" and has been ended") if verbs else "",
        "seen_s": round(lost["monotonic_s"] - at, 3),
        "works_s": round(time.monotonic() - at, 1),
    }


def others(run: Rig, who: str) -> dict[tuple[str, int], int]:
    """The pids of everybody who is not struck, nor lives in a process that is."""
    return {
        (line["role"], line["rank"]): line["pid"]
        for line in run.roster()
        if not line["role"].startswith(who.split()[0])
    }


def disturbed(run: Rig, who: str, number: int, *, moments: int, seed: int) -> list[dict[str, Any]]:
    chance, seen = random.Random(seed), []
    run.start()
    run.until_step(1)
    before = others(run, who)
    for _ in range(moments):
        time.sleep(chance.uniform(0, WITHIN_S))
        seen.append(strike(run, who, number, chance))
        print(json.dumps(seen[-1]), flush=True)
    assert others(run, who) == before
    end(run)
    run.check()
    return seen


def end(run: Rig) -> None:
    """In order, after its step."""
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.log()


def compare(run: Rig, golden: Rig) -> int:
    """How many steps were the same."""
    both = min(len(run.steps()), len(golden.steps()))
    mine, theirs = ([step["actor/loss"] for step in each.steps()[:both]] for each in (run, golden))
    assert mine == pytest.approx(theirs, abs=1e-4)
    responses = run.responses()
    assert all(responses[uid] == text for uid, text in golden.responses().items() if uid in responses)
    return both


def measure(
    folder: Path, who: str, number: int, *, moments: int, seed: int = 0, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    settings = (*SETTINGS, *(BUSY_TRAINERS if who in TRAINERS else ()), *overrides)
    with rig(folder / "run", *settings) as run, rig(folder / "golden", *settings) as golden:
        seen = disturbed(run, who, number, moments=moments, seed=seed)
        golden.start()
        golden.until_step(min(len(run.steps()), MOST_COMPARED))
        end(golden)
        same = compare(run, golden)
    return {
        "who": who, "signal": signal.Signals(number).name, "moments": len(seen), "steps": len(run.steps()),
        "most_seen_s": max(one["seen_s"] for one in seen),
        "most_works_s": max(one["works_s"] for one in seen), "in": Counter(one["in"] for one in seen),
        "steps_compared": same, "each": seen,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--who", choices=[*VICTIMS], default="engine")
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="*", default=(), help="settings of the run, e.g. placement.take_turns=true"
    )
    options = parser.parse_args()
    number = getattr(signal, f"SIG{options.signal}")
    report = measure(
        options.folder, options.who, number, moments=options.moments, seed=options.seed, overrides=options.set
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
