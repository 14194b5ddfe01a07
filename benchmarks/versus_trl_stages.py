"""Tokens per second of SFT and DPO against TRL's trainers: same CPU, model, rows, batch and longest row.

    python benchmarks/versus_trl_stages.py --stage sft --trl-python PATH --data alpaca_en_demo.json
    python benchmarks/versus_trl_stages.py --stage dpo --trl-python PATH --data dpo_en_demo.json
    python benchmarks/versus_trl_stages.py --stage sft ... --only quartet trl_grouped     # some of the modes

Each call adds ``--runs`` runs of every mode, alternating, to benchmarks/results/versus_trl_stages_cpu.json:
it can be measured in pieces. SmolLM2-135M in float32, sdpa attention, full training with AdamW. Beside the
wall time stand CPU seconds, on our side those of every process of the run with Ray's daemons: on a machine
that others use too, tokens per CPU second say more (``--threads 1``). The rows have their real lengths: whole
Alpaca rows of at most ``MAX_LENGTH`` tokens; of dpo_en_demo the texts are cut after some words. Both sides
get the same texts, chat template applied, and count the same tokens, padding left out. The first step of a
run does not count. TRL runs with each of its own remedies for padding (``benchmarks/trl_stage.py``); the
ratio is that of the best modes on either side, by medians. A mode named ``allocator_...`` is TRL in a process
with the settings of glibc's allocator that Quartet gives its workers (``launch/environment.py``): it is no
setting of TRL's and not in the ratio, and says what is left of it without them.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.stages import cut  # noqa: E402
from launch.environment import MODEL_ENV  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "versus_trl_stages_cpu.json"
MAX_LENGTH, SEED, LEARNING_RATE = 256, 0, 1e-5
BATCH = {"sft": 16, "dpo": 8}
STEPS = {"sft": 5, "dpo": 4}
WARM_UP = 1
MICRO_TOKENS = 768  # Quartet's; TRL counts rows
PROMPT_WORDS, RESPONSE_WORDS = 30, 50  # of dpo_en_demo
ALLOCATOR = "allocator"  # Quartet's settings of glibc's around TRL's process

MODES = {
    "sft": {
        "quartet": (),
        "quartet_packed": ("sft.packing=true",),
        "trl": ("--micro", "16"),
        "trl_small_micro": ("--micro", "4"),
        "trl_grouped": ("--micro", "4", "--group-by-length"),
        "trl_grouped_8": ("--micro", "8", "--group-by-length"),
        "allocator_trl_grouped": ("--micro", "4", "--group-by-length", ALLOCATOR),
        "trl_packed": ("--micro", "1", "--packing"),
    },
    "dpo": {
        "quartet": (),
        "quartet_precomputed": ("preference.precompute_reference=true",),
        "trl": ("--micro", "8"),
        "trl_small_micro": ("--micro", "2"),
        "trl_precomputed": ("--micro", "2", "--precompute"),
        "trl_precomputed_4": ("--micro", "4", "--precompute"),
        "allocator_trl_precomputed": ("--micro", "2", "--precompute", ALLOCATOR),
    },
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=MODES, required=True)
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with TRL")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--only", nargs="+", help="modes to run")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stage = f"{arguments.stage}, {arguments.threads} thread(s)"
    found = results.setdefault(stage, {"runs": {}})
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(arguments, Path(folder))
        for _ in range(arguments.runs):
            for mode in arguments.only or MODES[arguments.stage]:
                side = quartet if mode.startswith("quartet") else trl
                run = side(arguments, Path(folder), rows, MODES[arguments.stage][mode])
                found["runs"].setdefault(mode, []).append(run)
                print(mode, json.dumps(run), flush=True)
                results[stage] = summary(arguments.stage, found["runs"])
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def write_rows(arguments, folder):
    """Prompts with the chat template around them, so that both sides tokenise the same texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = []
    for row in json.loads(arguments.data.read_text()):
        if arguments.stage == "sft":
            prompt, answers = f"{row['instruction']}\n{row['input']}".strip(), {"response": row["output"]}
        else:
            prompt = cut(row["conversations"][-1]["value"], PROMPT_WORDS)
            answers = {
                name: cut(row[key]["value"], RESPONSE_WORDS)
                for name, key in (("response", "chosen"), ("rejected", "rejected"))
            }
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        lengths = [len(tokenizer(asked + text)["input_ids"]) + 1 for text in answers.values()]
        if max(lengths) <= MAX_LENGTH and len(set(answers.values())) == len(answers):
            rows.append({"prompt": asked, **answers})
    random.Random(SEED).shuffle(rows)
    wanted = BATCH[arguments.stage] * STEPS[arguments.stage]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:wanted]))
    return file


def quartet(arguments, folder, rows, settings):
    """One run of the command from this checkout."""
    stage = "sft" if arguments.stage == "sft" else "preference"
    run = folder / "run.yaml"
    run.write_text("name: versus-trl\n")
    command = [
        sys.executable, "-m", "launch.cli", "train", str(run), f"run_dir={folder / 'quartet'}", "--fresh",
        f"model.path={Path(arguments.model).absolute()}", "model.dtype=float32",
        f"model.max_length={MAX_LENGTH}", f"{stage}.data.path={rows}", f"{stage}.heldout_fraction=0",
        f"{stage}.batch_size={BATCH[arguments.stage]}", f"{stage}.optimizer.learning_rate={LEARNING_RATE}",
        *(f"roles.{role}.threads={arguments.threads}" for role in ("actor", "reference")),
        *(f"roles.{role}.cpus_per_worker=0.5" for role in ("actor", "reference")),
        *(f"roles.{role}.micro_batch_tokens={MICRO_TOKENS}" for role in ("actor", "reference")), *settings,
    ]  # fmt: skip
    if any("packing" in setting for setting in settings):  # counted in sequences of MAX_LENGTH
        command += ["sft.batch_size=6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    log = folder / "quartet.log"
    with log.open("w") as stream:
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
        clock = []  # (time, CPU seconds of all processes until then)
        while running.poll() is None:
            clock.append((time.time(), cpu_seconds(running.pid)))
            time.sleep(0.2)
    if running.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()}")
    lines = [json.loads(line) for line in (folder / "quartet" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_s" in line]
    spans = [(line["time"] - line["step_s"], line["time"]) for line in steps]
    used = [at(clock, end) - at(clock, start) for start, end in spans]
    tokens = [line["tokens_per_s"] * line["step_s"] for line in steps]
    return figures([line["step_s"] for line in steps], used, tokens)


def cpu_seconds(pid):
    """Of the process and its descendants that are alive."""
    total = 0.0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in family:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def at(clock, moment):
    """Interpolated."""
    after = next(i for i, (time_, _) in enumerate(clock) if time_ >= moment)
    (t0, c0), (t1, c1) = clock[after - 1], clock[after]
    return c0 + (c1 - c0) * (moment - t0) / (t1 - t0)


def trl(arguments, folder, rows, settings):
    command = [
        arguments.trl_python, str(ROOT / "benchmarks" / "trl_stage.py"), "--stage", arguments.stage,
        "--model", str(Path(arguments.model).absolute()), "--rows", str(rows),
        "--batch", str(BATCH[arguments.stage]), "--steps", str(STEPS[arguments.stage]),
        "--max-length", str(MAX_LENGTH), "--learning-rate", str(LEARNING_RATE),
        "--threads", str(arguments.threads), "--out", str(folder / "trl"),
        *(word for word in settings if word != ALLOCATOR),
    ]  # fmt: skip
    if "--packing" in settings:
        command[command.index("--batch") + 1] = "6"
    environment = {**os.environ, **(MODEL_ENV if ALLOCATOR in settings else {})}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return figures(found["seconds"], found["cpu_seconds"], found["tokens"])


def figures(seconds, used, tokens):
    """Without the steps that warm up."""
    seconds, used, tokens = seconds[WARM_UP:], used[WARM_UP:], tokens[WARM_UP:]
    return {
        "tokens_per_s": round(sum(tokens) / sum(seconds), 2),
        "tokens_per_cpu_s": round(sum(tokens) / sum(used), 2), "tokens": round(sum(tokens)),
        "seconds": [round(each, 3) for each in seconds], "cpu_seconds": [round(each, 3) for each in used],
    }  # fmt: skip


def summary(stage, runs):
    """Medians and ranges of every mode, and the best of ours over the best of theirs."""
    report = {"batch": BATCH[stage], "max_length": MAX_LENGTH}
    for rate in ("tokens_per_s", "tokens_per_cpu_s"):
        seen = {mode: sorted(run[rate] for run in each) for mode, each in runs.items()}
        medians = {mode: statistics.median(rates) for mode, rates in seen.items()}
        ours, theirs = (
            max((median for mode, median in medians.items() if mode.startswith(side)), default=None)
            for side in ("quartet", "trl")
        )
        report[rate] = {mode: [medians[mode], rates[0], rates[-1]] for mode, rates in seen.items()}
        if ours and theirs:
            report[f"speedup_{rate}"] = round(ours / theirs, 3)
    return {**report, "runs": runs}


if __name__ == "__main__":
    main()
