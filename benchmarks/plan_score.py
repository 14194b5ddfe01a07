"""How good is the foresight? Layouts of the quickstart's rl stage, measured and predicted by the planner.

    python benchmarks/plan_score.py measure [LAYOUT ...]   # 90 s each on two cores; default: those not yet
    python benchmarks/plan_score.py fit                    # rates and overheads, from layouts set aside
    python benchmarks/plan_score.py score                  # table and plot of the others

All layouts start from one SFT checkpoint and one reward model. Measured are the seconds per warm step of each
and the peak of the memory of all processes together (PSS). A layout that is named is measured once more; of
several runs the medians count.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.peak_memory import MARKER, members, memory  # noqa: E402
from benchmarks.steady import steady  # noqa: E402
from launch.bench.result import cpu_model  # noqa: E402
from launch.cli import resolve  # noqa: E402
from orchestrator.plan.calibration import SHIPPED, read_calibration  # noqa: E402
from orchestrator.plan.devices import DEVICES, GIB, parse_cluster  # noqa: E402
from orchestrator.plan.fit import Planned, fits  # noqa: E402
from orchestrator.plan.memory import Overheads, total  # noqa: E402
from orchestrator.plan.predict import Prediction, simulate  # noqa: E402
from orchestrator.plan.service import Rates, sheet_rates  # noqa: E402
from orchestrator.plan.shapes import NAMED, shape_of  # noqa: E402
from orchestrator.plan.stages import Shapes  # noqa: E402
from orchestrator.plan.workload import workload  # noqa: E402

CALIBRATED = SHIPPED / "cpu_float32.json"
REPORT = ROOT / "benchmarks" / "results" / "plan_score_cpu"
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
    found = runs()
    for name in names:
        one = measured(name, work / name.replace(" ", "_").replace(",", ""), base, smollm2)
        print(name, one["step_s"], round(one["peak_gib"], 2), flush=True)
        found.setdefault(name, []).append(one)
        MEASURED.write_text(json.dumps(found, indent=1) + "\n")


def runs() -> dict[str, list[dict[str, Any]]]:
    """By layout, what ``measured`` gave each time."""
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}


def medians() -> dict[str, dict[str, Any]]:
    """By layout, of its runs."""
    return {name: _median(each) for name, each in runs().items()}


def _median(values: Sequence[Any]) -> Any:
    """Of numbers; of mappings by key, of lists by place."""
    if isinstance(values[0], dict):
        return {key: _median([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [_median(each) for each in zip(*values, strict=True)]
    return statistics.median(values)


def measured(name: str, folder: Path, base: Path, smollm2: Path) -> dict[str, Any]:
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

    def middle(key: str) -> float:
        return round(statistics.median(step.get(key, 0.0) for step in steps), 4)

    keys = sorted({key for step in steps for key in step if key.startswith("seconds/")})
    return {
        "step_s": round(steady([step["step_s"] for step in steps]), 4),
        "steps_s": [round(step["step_s"], 4) for step in steps],
        "response_tokens": round(statistics.mean(step["response_tokens"] for step in steps), 2),
        "seconds": {key.removeprefix("seconds/"): middle(key) for key in keys},
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


TASK_SHAPE = {  # of launch/tasks/addition.py
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 1152, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 15,
}  # fmt: skip
PROMPT_TOKENS = {False: 6, True: 43}  # smollm2 or not
FITTED = (
    "flops", "bandwidth", "layer_s", "call_s", "row_s", "update_s", "iteration_s", "slot_s", "request_s",
    "sync_s", "sync_bandwidth", "sharing",
)  # fmt: skip
PHASES = ("generate", "update", "score", "sync")  # that the fit looks at, beside the step


def planned(name: str, overheads: Overheads, response: float) -> Planned:
    """The layout as the planner sees it; the mean length of the responses is the run's, whatever it
    measured."""
    models = [] if is_smollm2(name) else ["roles.reward.model=x"]
    run = resolve(["quickstart", *settings(name), *models, "model.path=x"])
    shape = NAMED["smollm2-135m"] if is_smollm2(name) else shape_of(TASK_SHAPE, where="the task")
    flow = workload(run, run.rl, prompt=PROMPT_TOKENS[is_smollm2(name)], response=response)
    cluster = parse_cluster("1x2xcpu@24")
    return Planned(
        run=run, shapes=Shapes(base=shape, by_role={}), cluster=cluster, workload=flow, overheads=overheads
    )


def predicted(name: str, measured: dict, rates: Rates, overheads: Overheads) -> tuple[Prediction, float]:
    """The step, and the bytes of all processes."""
    plan = planned(name, overheads, measured["response_tokens"])
    (found,) = [fit for fit in fits(plan) if fit.stage.name == "rl"]
    return simulate(plan, rates), total(found.pools[-1].parts)


def loss(rates: Rates, measured: dict[str, dict]) -> float:
    """Squared logarithms of predicted over measured seconds: of the step, and an eighth as heavy of the
    phases, whose wall time counts waiting too."""
    sum_ = 0.0
    for name, one in measured.items():
        found = simulate(planned(name, Overheads(), one["response_tokens"]), rates)
        sum_ += math.log(found.step_s / one["step_s"]) ** 2
        for phase in PHASES:
            ours, theirs = found.seconds.get(phase, 0.0), one["seconds"].get(phase, 0.0)
            if ours and theirs:
                sum_ += math.log(ours / theirs) ** 2 / 8 / len(PHASES)
    return sum_


def fit(measured: dict[str, dict], rounds: int) -> Rates:
    """Coordinate descent on the logarithms of the rates, from those that there are: a
    calibration's, or the data sheet's."""
    rates, factors = sheet_rates(DEVICES["cpu"], "float32"), [1.6, 1.3, 1.15, 1.08, 1.04]
    if CALIBRATED.exists():
        rates, factors = read_calibration(CALIBRATED, DEVICES["cpu"], "float32")[0], [1.12, 1.06]
    best = loss(rates, measured)
    for round_ in range(rounds):
        factor = factors[min(round_, len(factors) - 1)]
        for field in FITTED:
            for step in (factor, 1 / factor):
                tried = replace(rates, **{field: getattr(rates, field) * step})
                if tried.sharing > 1 or (now := loss(tried, measured)) >= best:
                    continue
                rates, best = tried, now
                break
        print(f"round {round_ + 1}: {best:.4f}", flush=True)
    return rates


def fitted_overheads(measured: dict[str, dict]) -> dict[str, float]:
    """GiB of each role's process: what is left of its peak without what is counted. The driver's takes the
    rest, so that the sum is the peak of all together."""
    found: dict[str, list[float]] = {}
    for name, one in measured.items():
        plan = planned(name, Overheads(), one["response_tokens"])
        (rl,) = [each for each in fits(plan) if each.stage.name == "rl"]
        counted = {}
        for worker in rl.pools[-1].workers:
            counted[worker.role] = sum(p.bytes for p in worker.host if p.name != "process") / GIB
        for role, peak in one["peak_by_role_gib"].items():
            if role in counted:
                found.setdefault(role, []).append(peak - counted[role])
        others = sum(part.bytes for part in rl.pools[-1].parts if "process" not in part.name) / GIB
        others -= Overheads().process["driver"] / GIB
        found.setdefault("all", []).append(one["peak_gib"] - others)
    middle = {role: statistics.median(values) for role, values in found.items()}
    together = middle.pop("all")
    middle["driver"] = together - sum(size for role, size in middle.items() if role != "driver")
    return {role: round(size, 3) for role, size in middle.items()}


def calibrate(rounds: int) -> None:
    everything = medians()
    chosen = {name: everything[name] for name in CALIBRATION if name in everything}
    rates = fit(chosen, rounds)
    tiny = {name: one for name, one in chosen.items() if not is_smollm2(name)}
    plain = {field: float(f"{value:.4g}") for field, value in asdict(rates).items() if field != "source"}
    machine, layouts = f"{os.cpu_count()} cores ({cpu_model()})", ", ".join(chosen)
    tree = {
        "device": "cpu", "dtype": "float32",
        "source": f"{machine}, benchmarks/plan_score.py, layouts: {layouts}",
        "rates": plain | {"error": 0.2}, "process_gib": fitted_overheads(tiny),
    }  # fmt: skip
    CALIBRATED.parent.mkdir(exist_ok=True)
    CALIBRATED.write_text(json.dumps(tree, indent=1) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One layout, measured and predicted."""

    name: str
    scored: bool  # False: the calibration saw it
    step_s: float
    predicted_s: float
    tokens_per_s: float
    predicted_tokens_per_s: float
    peak_gib: float
    predicted_gib: float

    @property
    def time_error(self) -> float:
        return abs(self.predicted_s / self.step_s - 1)

    @property
    def memory_error(self) -> float:
        return abs(self.predicted_gib / self.peak_gib - 1)


def scores() -> list[Score]:
    """Of every scored layout that was measured."""
    everything = medians()
    rates, overheads = read_calibration(None, DEVICES["cpu"], "float32")
    found = []
    for name in (*SCORED, *CALIBRATION):
        if name in everything:
            one = everything[name]
            step, memory_bytes = predicted(name, one, rates, overheads)
            found.append(
                Score(
                    name=name, scored=name in SCORED, step_s=one["step_s"], predicted_s=step.step_s,
                    tokens_per_s=step.tokens / one["step_s"], predicted_tokens_per_s=step.tokens_per_s,
                    peak_gib=one["peak_gib"], predicted_gib=memory_bytes / GIB,
                )
            )  # fmt: skip
    return found


def best_behind(found: Sequence[Score]) -> float:
    """By which share the layout predicted to be the fastest is measured behind the fastest, in tokens/s."""
    chosen = max(found, key=lambda one: one.predicted_tokens_per_s)
    return 1 - chosen.tokens_per_s / max(one.tokens_per_s for one in found)


def report(found: Sequence[Score]) -> str:
    judged = [one for one in found if one.scored]
    time = statistics.median(one.time_error for one in judged)
    memory_ = statistics.median(one.memory_error for one in judged)
    tiny = [one for one in judged if not is_smollm2(one.name)]
    rows = [
        "Predicted by `quartet plan`, measured on two CPU cores; by `benchmarks/plan_score.py`.",
        "",
        f"Median error over the {len(judged)} scored layouts: step time {time:.0%} (largest "
        f"{max(one.time_error for one in judged):.0%}), peak memory {memory_:.0%} (largest "
        f"{max(one.memory_error for one in judged):.0%}). The quickstart layout predicted to have the most "
        "tokens per "
        f"second is measured {best_behind(tiny):.0%} behind the best.",
        "",
        "| layout | scored | step, predicted s | measured s | error | memory, predicted GiB | measured | "
        "error |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        rows.append(
            f"| {one.name} | {'yes' if one.scored else 'calibration'} | {one.predicted_s:.3g} | "
            f"{one.step_s:.3g} | "
            f"{one.predicted_s / one.step_s - 1:+.0%} | {one.predicted_gib:.2f} | {one.peak_gib:.2f} | "
            f"{one.predicted_gib / one.peak_gib - 1:+.0%} |"
        )
    return "\n".join(rows) + "\n"


def plot(found: Sequence[Score]) -> str:
    """Predicted against measured, both logarithmic: step time on the left, memory on the right, the line is
    right."""
    panels = [
        _panel("step time, s", [(o.step_s, o.predicted_s, o) for o in found], 0),
        _panel("peak memory, GiB", [(o.peak_gib, o.predicted_gib, o) for o in found], 320),
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 330" width="640" height="330" '
        'font-family="sans-serif" font-size="10"><rect width="640" height="330" fill="white"/>'
        + "".join(panels)
        + '<text x="40" y="322">filled: scored; open: seen by the calibration</text></svg>\n'
    )


def _panel(title: str, points: Sequence[tuple[float, float, Score]], left: float) -> str:
    low = math.log(min(min(x, y) for x, y, _ in points) / 1.2)
    high = math.log(max(max(x, y) for x, y, _ in points) * 1.2)

    def at(value: float) -> float:
        return (math.log(value) - low) / (high - low) * 250

    parts = [
        f'<text x="{left + 40}" y="18">{title}: predicted (up) by measured (right)</text>',
        f'<rect x="{left + 40}" y="30" width="250" height="250" fill="none" stroke="#ccc"/>',
        f'<line x1="{left + 40}" y1="280" x2="{left + 290}" y2="30" stroke="#999"/>',
    ]
    for value in (math.exp(low) * 1.2, math.exp(high) / 1.2):
        parts.append(f'<text x="{left + 40 + at(value):.0f}" y="294" text-anchor="middle">{value:.3g}</text>')
        parts.append(f'<text x="{left + 36}" y="{284 - at(value):.0f}" text-anchor="end">{value:.3g}</text>')
    for x, y, one in points:
        fill = "#1f6fb2" if one.scored else "none"
        centre = f'cx="{left + 40 + at(x):.1f}" cy="{280 - at(y):.1f}"'
        parts.append(
            f'<circle {centre} r="4" fill="{fill}" stroke="#1f6fb2"><title>{one.name}</title></circle>'
        )
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=["measure", "fit", "score"])
    parser.add_argument("layouts", nargs="*", help=", ".join(LAYOUTS))
    parser.add_argument("--smollm2", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "plan")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.verb == "fit":
        calibrate(arguments.rounds)
    if arguments.verb in ("fit", "score"):
        found = scores()
        REPORT.with_suffix(".md").write_text(report(found))
        REPORT.with_suffix(".svg").write_text(plot(found))
        print(report(found))
        return
    work = arguments.work.resolve()
    base = work / "base"
    if not (base / "stages.json").exists():
        subprocess.run(
            [sys.executable, "-m", "launch.cli", "train", "quickstart", f"run_dir={base}", "rl=null",
             "--fresh"],
            check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    wanted = arguments.layouts or [name for name in LAYOUTS if name not in runs()]
    measure(wanted, work, base, arguments.smollm2)


if __name__ == "__main__":
    main()
