"""How good is the foresight? Layouts of the quickstart's rl stage, measured and predicted by the planner.

    python benchmarks/plan_score.py measure [LAYOUT ...]   # about 40 s each on two cores
    python benchmarks/plan_score.py fit                    # rates and overheads, from layouts set aside
    python benchmarks/plan_score.py score                  # table and plot of the others

All layouts start from one SFT checkpoint and one reward model. Measured are the lower quartile of the step
times (other jobs ran on this machine) and the peak of the memory of all processes together (PSS).
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.peak_memory import MARKER, members, memory  # noqa: E402

MEASURED = ROOT / "benchmarks" / "results" / "plan_measured_cpu.json"
STEPS, WARM = 16, 2  # the first steps allocate and compile
SMOLLM2_STEPS = 4
EVERY_S = 1.0  # a look takes 30 ms, which the run itself lacks

# What each layout lays on the quickstart. The first block is for calibration, the second for the score.
CALIBRATION = {
    "default": [],
    "small batch": ["rl.prompts_per_step=16"],
    "large batch": ["rl.prompts_per_step=128"],
    "async": ["rl.staleness=1"],
    "two actors": ["roles.actor.workers=2", "roles.actor.cpus_per_worker=0.2"],
    "smollm2": ["SMOLLM2"],
}
SCORED = {
    "half batch": ["rl.prompts_per_step=32"],
    "8 samples": ["rl.samples_per_prompt=8", "rl.prompts_per_step=48"],
    "one update": ["rl.updates.minibatches=1"],
    "8 updates": ["rl.updates.minibatches=8"],
    "two engines": ["engine.replicas=2", "engine.cpus_per_worker=0.2"],
    "two critics": ["roles.critic.workers=2", "roles.critic.cpus_per_worker=0.2"],
    "async, small": ["rl.staleness=1", "rl.prompts_per_step=24"],
    "async, two engines": ["rl.staleness=1", "engine.replicas=2", "engine.cpus_per_worker=0.2"],
    "shared": ["placement.share=[[actor, reference], [critic, reward]]", "rl.prompts_per_step=96"],
    "micro-batches": ["roles.actor.micro_batch_tokens=256", "roles.critic.micro_batch_tokens=256"],
    "smollm2, one update": ["SMOLLM2", "rl.updates.minibatches=1"],
    "smollm2, long": ["SMOLLM2", "rl.sampling.max_new_tokens=64", "rl.prompts_per_step=4"],
}  # fmt: skip
LAYOUTS = CALIBRATION | SCORED

COMMON = [
    "sft=null", "reward_model=null", "rl.samples_every=0", f"rl.steps={STEPS}", "rl.evaluation.every=0",
]  # fmt: skip
SMOLLM2 = [
    "sft=null", "reward_model=null", "rl.samples_every=0", f"rl.steps={SMOLLM2_STEPS}", "task=null",
    "model={path: models/smollm2, dtype: float32, max_length: 128}", "rl.evaluation=null",
    "rl.algorithm={name: grpo, kl_coef: 0.001}",
    "rl.prompts_per_step=8", "rl.samples_per_prompt=2", "rl.sampling.max_new_tokens=32",
    "rl.updates.minibatches=2", "roles.reward={function: letter_fraction, cpus_per_worker: 0.4}",
    "roles.actor.micro_batch_tokens=1024", "roles.reference.micro_batch_tokens=1024",
]  # fmt: skip


def settings(name: str) -> list[str]:
    """All a.b.c=value of a layout, without where its models lie."""
    own = LAYOUTS[name]
    return [*SMOLLM2, *own[1:]] if own[:1] == ["SMOLLM2"] else [*COMMON, *own]


def is_smollm2(name: str) -> bool:
    return LAYOUTS[name][:1] == ["SMOLLM2"]


class PeakMemory(threading.Thread):
    """Watches every process with the marker; keeps the largest sum, and each process's own peak."""

    def __init__(self, marker: str, roster: Path) -> None:
        super().__init__(daemon=True)
        self.marker, self.roster, self.stop = marker.encode(), roster, threading.Event()
        self.total, self.peaks, self.lines = 0, {}, {}

    def run(self) -> None:
        while not self.stop.wait(EVERY_S):
            sizes = {pid: memory(pid)[0] for pid in members(self.marker)}
            self.total = max(self.total, sum(sizes.values()))
            for pid, size in sizes.items():
                self.peaks[pid] = max(self.peaks.get(pid, 0), size)
            with contextlib.suppress(OSError, ValueError):  # names only who is alive; may be half written
                self.lines |= {line["pid"]: line for line in json.loads(self.roster.read_text())}

    def by_role(self) -> dict[str, int]:
        """Bytes of the largest worker of each role with its children; the rest is the driver's and Ray's."""
        roles: dict[str, dict[str, int]] = {}
        named = set()
        for line in self.lines.values():
            words = line["role"].split()  # "actor", or "engine 1 child"
            key = words[1] if len(words) > 1 else str(line["rank"])
            workers = roles.setdefault(words[0], {})
            workers[key] = workers.get(key, 0) + self.peaks.get(line["pid"], 0)
            named.add(line["pid"])
        rest = sum(peak for pid, peak in self.peaks.items() if pid not in named)
        found = {role: max(workers.values()) for role, workers in roles.items()}
        return found | {"driver": found.get("driver", 0) + rest}


def measure(names: Sequence[str], work: Path, base: Path, smollm2: Path) -> None:
    found = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    for name in names:
        found[name] = measured(name, work / name.replace(" ", "_").replace(",", ""), base, smollm2)
        print(name, found[name]["step_s"], round(found[name]["peak_gib"], 2), flush=True)
        MEASURED.write_text(json.dumps(found, indent=1) + "\n")


def measured(name: str, folder: Path, base: Path, smollm2: Path) -> dict[str, object]:
    """Runs the layout and reads what it wrote."""
    models = []
    if is_smollm2(name):
        prompts = f"{{path: {work_prompts(folder.parent)}, chat_template: true}}"
        models = [f"model.path={smollm2}", f"rl.prompts={prompts}"]
    else:
        results = json.loads((base / "stages.json").read_text())
        models = [f"roles.actor.model={results['sft']['model']}"]
        models.append(f"roles.reward.model={results['reward_model']['model']}")
    marker = f"{MARKER}={uuid.uuid4().hex}"
    watch = PeakMemory(marker, folder / "roster.json")
    watch.start()
    variable, value = marker.split("=")
    subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "quickstart", *settings(name), f"run_dir={folder}",
         *models, "--fresh"],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
        env=os.environ | {variable: value, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    watch.stop.set()
    watch.join()
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in lines if "step_s" in entry][1 if is_smollm2(name) else WARM :]

    def quartile(key: str) -> float:
        """The faster quarter ends here: other jobs on the machine only ever slow a step down."""
        return round(
            statistics.quantiles([step.get(key, 0.0) for step in steps], n=4, method="inclusive")[0], 4
        )

    keys = sorted({key for step in steps for key in step if key.startswith("seconds/")})
    return {
        "step_s": quartile("step_s"),
        "steps_s": [round(step["step_s"], 4) for step in steps],
        "response_tokens": round(statistics.mean(step["response_tokens"] for step in steps), 2),
        "seconds": {key.removeprefix("seconds/"): quartile(key) for key in keys},
        "peak_gib": watch.total / 2**30,
        "peak_by_role_gib": {role: size / 2**30 for role, size in watch.by_role().items()},
    }


def work_prompts(folder: Path) -> Path:
    """Sixty-four questions of about thirty tokens with the template."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prompts.jsonl"
    questions = [f"Write {n + 3} short words that begin with the letter A." for n in range(64)]
    file.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=["measure"])
    parser.add_argument("layouts", nargs="*", help=", ".join(LAYOUTS))
    parser.add_argument("--smollm2", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "plan")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    base = work / "base"
    if not (base / "stages.json").exists():
        subprocess.run(
            [sys.executable, "-m", "launch.cli", "train", "quickstart", f"run_dir={base}", "rl=null",
             "--fresh"],
            check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    measure(arguments.layouts or list(LAYOUTS), work, base, arguments.smollm2)


if __name__ == "__main__":
    main()
