"""Do the supervised stages learn from real data? SFT, reward models, six preference losses on SmolLM2-135M.

    python benchmarks/stages.py --data FOLDER --model models/smollm2   # all of them, some minutes each
    python benchmarks/stages.py --data FOLDER --only dpo kto           # these; the others keep their figures
    python benchmarks/stages.py --only                                 # writes the table again

``--data`` holds alpaca_en_demo.json, dpo_en_demo.json, kto_en_demo.json and
hh_rlhf_harmless_base_test.jsonl.gz. Each run is ``quartet train smollm2`` with one stage, from the same base
model. Two cores have no time for whole rows: texts of the two preference files are cut after some words (the
table says how many), of the other two whole short rows are taken. Rows are shuffled by the seed, the last
ones held out. Figures are written after every run, so that a cut costs one.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "stages_cpu"
SEED = 0
PROMPT_WORDS, RESPONSE_WORDS = 16, 24  # of the preference files
ALPACA_WORDS, DIALOGUE_WORDS = 60, 48  # of whole rows
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One row of the table."""

    stage: str
    rows: Callable[[Path], Iterator[Row]]
    train: int  # rows
    heldout: int
    settings: tuple[str, ...] = ()
    learning_rate: float = 5e-6
    batch_size: int = 8


def alpaca(folder: Path) -> Iterator[Row]:
    for row in json.loads((folder / "alpaca_en_demo.json").read_text()):
        prompt = f"{row['instruction']}\n{row['input']}".strip()
        if len(f"{prompt} {row['output']}".split()) <= ALPACA_WORDS:
            yield {"prompt": prompt, "response": row["output"]}


def pairs(folder: Path) -> Iterator[Row]:
    for row in json.loads((folder / "dpo_en_demo.json").read_text()):
        chosen, rejected = (cut(row[key]["value"], RESPONSE_WORDS) for key in ("chosen", "rejected"))
        if chosen != rejected:
            prompt = cut(row["conversations"][-1]["value"], PROMPT_WORDS)
            yield {"prompt": prompt, "response": chosen, "rejected": rejected}


def labels(folder: Path) -> Iterator[Row]:
    for row in json.loads((folder / "kto_en_demo.json").read_text()):
        *_, question, answer = (message["content"] for message in row["messages"])
        yield {
            "prompt": cut(question, PROMPT_WORDS), "response": cut(answer, RESPONSE_WORDS),
            "label": row["label"],
        }  # fmt: skip


def dialogues(folder: Path) -> Iterator[Row]:
    with gzip.open(folder / "hh_rlhf_harmless_base_test.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            texts = row["chosen"], row["rejected"]
            if texts[0] != texts[1] and all(len(text.split()) <= DIALOGUE_WORDS for text in texts):
                yield {"response": texts[0], "rejected": texts[1]}


def cut(text: str, words: int) -> str:
    """The first words with what stands between them."""
    end = 0
    for word in text.split()[:words]:
        end = text.index(word, end) + len(word)
    return text[:end]


PREFERENCE = {"stage": "preference", "rows": pairs, "train": 48, "heldout": 48, "learning_rate": 1e-5}
UPPER = ("model.freeze=['*embed*', 'model.layers.?.*', 'model.layers.1?.*']",)  # 20 of 30 layers
TRIALS = {
    "sft alpaca": Trial(stage="sft", rows=alpaca, train=200, heldout=160, learning_rate=2e-5),
    "reward model dpo_en_demo": Trial(
        stage="reward_model", rows=pairs, train=128, heldout=64, learning_rate=5e-5, settings=UPPER
    ),
    "reward model hh-rlhf": Trial(
        stage="reward_model", rows=dialogues, train=240, heldout=120, learning_rate=5e-5,
        settings=(*UPPER, "reward_model.data.prompt_key=''"),
    ),
    "dpo": Trial(**PREFERENCE),
    "ipo": Trial(**PREFERENCE),
    "cpo": Trial(**PREFERENCE),
    "orpo": Trial(**PREFERENCE),
    "simpo": Trial(**PREFERENCE),
    "kto": Trial(
        stage="preference", rows=labels, train=96, heldout=80, learning_rate=1e-5
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--only", nargs="*", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--again", action="store_true", help="also those that have figures")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "stages")
    arguments = parser.parse_args()
    file = RESULTS.with_suffix(".json")
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.only:
        if name in results and not arguments.again:
            continue
        results[name] = measure(name, TRIALS[name], arguments)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        ordered = {trial: results[trial] for trial in TRIALS if trial in results}
        file.write_text(json.dumps(ordered, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(results))


def measure(name: str, trial: Trial, arguments: argparse.Namespace) -> dict[str, Any]:
    """Held-out figures before and after, and what the training took."""
    folder = arguments.work / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    data = write_rows(trial, arguments.data, folder)
    common = (
        f"{trial.stage}.data.path={data}", f"{trial.stage}.data.prompt_key=prompt",
        f"{trial.stage}.data.response_key=response", f"{trial.stage}.data.chat_template=true",
        f"{trial.stage}.batch_size={trial.batch_size}",
        f"{trial.stage}.heldout_fraction={trial.heldout / (trial.train + trial.heldout)}",
        f"{trial.stage}.optimizer.schedule=linear", f"{trial.stage}.optimizer.warmup_steps=2",
        f"model.path={Path(arguments.model).absolute()}", "rl=null", *trial.settings,
    )  # fmt: skip
    if trial.stage == "preference":
        common += (f"preference.objective.name={name}", "preference.precompute_reference=true")
    if trial.stage != "reward_model":
        common = ("reward_model=null", *common)
    else:
        common += ("reward_model.data.rejected_key=rejected",)
    started = time.monotonic()
    lines = quartet(folder / "run", *common, f"{trial.stage}.optimizer.learning_rate={trial.learning_rate}")
    seconds = time.monotonic() - started
    steps = [line for line in lines if "step_s" in line]
    before, after = (heldout(line) for line in lines if "heldout_loss" in line)
    return {
        "stage": trial.stage, "rows_train": trial.train, "rows_heldout": trial.heldout,
        "batch_size": trial.batch_size, "learning_rate": trial.learning_rate, "seed": SEED,
        "settings": trial.settings, "steps": len(steps),
        "tokens": round(sum(line["tokens_per_s"] * line["step_s"] for line in steps)),
        "seconds_training": round(sum(line["step_s"] for line in steps), 1),
        "seconds_with_start_and_heldout": round(seconds, 1),
        "before": before, "after": after,
    }  # fmt: skip


def write_rows(trial: Trial, data: Path, folder: Path) -> Path:
    rows = list(trial.rows(data))
    random.Random(SEED).shuffle(rows)
    wanted = trial.train + trial.heldout
    if len(rows) < wanted:
        sys.exit(f"{data}: {len(rows)} rows fit, {wanted} are wanted")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:wanted]))
    return file


def quartet(folder: Path, *settings: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one run of the command as a user types it, from this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "smollm2", f"run_dir={folder}", f"seed={SEED}",
         *settings, "--fresh"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"quartet train {' '.join(settings)} failed:\n{done.stdout}\n{done.stderr}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def heldout(line: dict[str, Any]) -> dict[str, float]:
    """Without the prefix."""
    return {
        name.removeprefix("heldout_"): round(figure, 4)
        for name, figure in line.items() if name.startswith("heldout_")
    }  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "SmolLM2-135M-Instruct, float32, one stage each from the same weights, measured on rows that were",
        "not trained on; by `benchmarks/stages.py`. All weights are trained, or where it says so the upper",
        "10 of 30 layers and the head. In brackets 95 % intervals: Wilson's for accuracies, of a mean over",
        f"rows for losses. Seed {SEED}. Whole rows: of alpaca those of at most",
        f"{ALPACA_WORDS} words, of hh-rlhf of {DIALOGUE_WORDS}; dpo_en_demo (dpo to simpo) and kto_en_demo:",
        f"prompts cut after {PROMPT_WORDS} words, responses after {RESPONSE_WORDS}. One thread, beside",
        "other jobs.",
        "",
        "| run | rows, held out | steps | loss before | loss after | change, row by row | accuracy before "
        "| accuracy after | tokens | seconds |",
        "|---|---:|---:|---|---|---|---|---|---:|---:|",
    ]
    for name in [name for name in TRIALS if name in results]:
        found = results[name]
        before, after = found["before"], found["after"]
        rows.append(
            f"| {name}{', upper layers' if UPPER[0] in found.get('settings', ()) else ''} "
            f"| {found['rows_train']}, {found['rows_heldout']} | {found['steps']} "
            f"| {interval(before, 'loss')} | {interval(after, 'loss')} | {interval(after, 'loss_change')} "
            f"| {interval(before, 'accuracy')} | {interval(after, 'accuracy')} "
            f"| {found['tokens']} | {found['seconds_training']:.0f} |"
        )
    return "\n".join(rows) + "\n"


def interval(figures: dict[str, float], name: str) -> str:
    if name not in figures:
        return ""
    if f"{name}_low" not in figures:
        return f"{figures[name]:.3f}"
    return f"{figures[name]:.3f} ({figures[f'{name}_low']:.3f} to {figures[f'{name}_high']:.3f})"


if __name__ == "__main__":
    main()
