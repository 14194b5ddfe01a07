"""Do they learn? Every algorithm trains the quickstart's rl stage from one SFT checkpoint, in as many steps.

    python benchmarks/algorithms.py                      # all presets of algorithms, about a minute each
    python benchmarks/algorithms.py --only grpo dapo     # these; the others keep the figures they have
    python benchmarks/algorithms.py --only               # draws table and plot again

The same for all: SFT checkpoint, prompts, seed, number of steps, responses per step, and the reward, which is
the task's own judge (exact match), so that no algorithm is ahead because a reward model has a hole that suits
it. An algorithm brings what its preset says (launch/presets/algorithms/) and nothing else. Writes
``algorithms_cpu.json``, ``.md`` and ``.svg`` into benchmarks/results/: held-out accuracy by step (greedy, on
500 problems that nobody trained on).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.small_multiples import Panel, draw  # noqa: E402
from launch.cli import algorithms  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "algorithms_cpu"
STEPS, EVERY = 20, 4
RESPONSES = 256  # per step, whatever the group size
LEARNS = 0.10  # gain in held-out accuracy below which an algorithm has not learned

COMMON = [
    "sft=null", "reward_model=null", "rl.samples_every=0",
    f"rl.steps={STEPS}", f"rl.evaluation.every={EVERY}",
    "roles.reward={function: exact_match, cpus_per_worker: 0.4}", "roles.critic.start_from=actor",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=algorithms(), default=algorithms())
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "algorithms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b.c=value", help="try a setting")
    arguments = parser.parse_args()
    file = RESULTS.with_suffix(".json")
    results = json.loads(file.read_text()) if file.exists() else {}
    checkpoint = sft_checkpoint(arguments.work / "base", arguments.seed) if arguments.only else None
    for name in arguments.only:
        results[name] = train(name, arguments.work / name, str(checkpoint), arguments.seed, arguments.set)
        print(f"{name}: {line(results[name])}", flush=True)
        file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(results))
    RESULTS.with_suffix(".svg").write_text(plot(results))


def sft_checkpoint(folder: Path, seed: int) -> Path:
    """The model all start from; trained once."""
    if not (folder / "stages.json").exists():
        quartet("quickstart", f"run_dir={folder}", f"seed={seed}", "reward_model=null", "rl=null", "--fresh")
    return Path(json.loads((folder / "stages.json").read_text())["sft"]["model"])


def train(name: str, folder: Path, checkpoint: str, seed: int, settings: Sequence[str]) -> dict[str, object]:
    started = time.monotonic()
    quartet(
        "quickstart", name, *COMMON, f"run_dir={folder}", f"seed={seed}", f"roles.actor.model={checkpoint}",
        *settings, "--fresh",
    )  # fmt: skip
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in lines if "step_s" in entry]
    drawn = sum(entry.get("groups_drawn", 0) for entry in steps)
    return {
        "accuracy": [[e["step"], e["heldout_accuracy"]] for e in lines if "heldout_accuracy" in e],
        "reward": [round(entry["reward"], 4) for entry in steps],
        "responses_per_step": RESPONSES,
        "groups_drawn": drawn or None,
        "seconds": round(time.monotonic() - started, 1),
    }


def quartet(*arguments: str) -> None:
    """The command as a user types it, from this checkout; its output is shown only when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"quartet train {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")


def gain(result: dict) -> float:
    return result["accuracy"][-1][1] - result["accuracy"][0][1]


def line(result: dict) -> str:
    return " ".join(f"{accuracy:.3f}" for _, accuracy in result["accuracy"]) + f"  {result['seconds']:.0f} s"


def table(results: dict[str, dict]) -> str:
    """Markdown, the best first."""
    steps = [step for step, _ in next(iter(results.values()))["accuracy"]]
    rows = [
        "Held-out accuracy by step (greedy, 500 problems), all from one SFT checkpoint, "
        f"{RESPONSES} responses a step; by `benchmarks/algorithms.py`.",
        "",
        "| algorithm | " + " | ".join(f"step {step}" for step in steps) + " | gain | learns | wall time |",
        "|---|" + "---:|" * (len(steps) + 1) + "---|---:|",
    ]
    for name, result in sorted(results.items(), key=lambda item: -item[1]["accuracy"][-1][1]):
        cells = [f"{accuracy:.3f}" for _, accuracy in result["accuracy"]]
        learns = "yes" if gain(result) >= LEARNS else "no"
        seconds = f"{result['seconds']:.0f} s"
        rows.append(f"| {name} | {' | '.join(cells)} | {gain(result):+.3f} | {learns} | {seconds} |")
    return "\n".join(rows) + "\n"


def plot(results: dict[str, dict]) -> str:
    panels = [Panel(title=name, points=result["accuracy"]) for name, result in sorted(results.items())]
    return draw(panels, x_label="rl step", y_label="held-out accuracy", y_range=(0.5, 1.0))


if __name__ == "__main__":
    main()
