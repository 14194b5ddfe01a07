"""Seconds per step against TRL on the same CPU, model, batch and lengths; runs alternate, medians of several.

    python benchmarks/versus_trl.py --algorithm grpo --trl-python PATH --peers FOLDER
    python benchmarks/versus_trl.py --algorithm ppo  --trl-python PATH --peers FOLDER

``--peers`` holds the baseline scripts ``trl_grpo.py`` and ``trl_ppo.py`` (one JSON line each);
``--trl-python`` is the interpreter of an environment with TRL (1.16.0 for GRPO; 1.12.0, the last with PPO,
for PPO). Both sides: a Qwen2 of 0.9M parameters over bytes, 8 prompts x 4 samples x at most 64 tokens,
float32, one optimizer step per step, both cores. Quartet runs in several modes each time: synchronously; with
``rl.staleness=1``, where the next batch is sampled while the last is trained on; and so with
``rl.updates.old_logprobs=rollout``, which takes the engine's log-probs instead of asking the actor. A run
counts by the median of its warm steps; the result is the median over runs with its spread, and the ratio of
each pair.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MODES = {
    "synchronous": ("rl.staleness=0",),
    "staleness_1": ("rl.staleness=1",),
    "staleness_1_rollout_logprobs": ("rl.staleness=1", "rl.updates.old_logprobs=rollout"),
}
WARM_UP = 3  # steps at the start of a run that do not count, on either side

MODEL = {
    "vocab_size": 258, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "dtype": "float32",
    "tie_word_embeddings": False, "pad_token_id": 256, "eos_token_id": 257, "bos_token_id": None,
}  # fmt: skip


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


def quartet_step(work: Path, algorithm: str, steps: int, mode: str) -> float:
    """Median seconds of the warm steps of one run."""
    prompts = work / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Write many e {i:03d}: "}) + "\n" for i in range(64)))
    folder = work / "quartet"
    reward = (
        f"roles.reward.model={work / 'scorer'}"
        if algorithm == "ppo"
        else "roles.reward.function=letter_fraction"
    )
    roles = ("actor", "critic", "reward", "reference")
    overrides = [
        f"run_dir={folder}", f"model.path={work / 'model'}", "model.dtype=float32", "model.max_length=128",
        reward, f"rl.prompts.path={prompts}", f"rl.steps={steps}", "rl.prompts_per_step=8",
        "rl.samples_per_prompt=4", "rl.sampling.max_new_tokens=64", "rl.samples_every=0",
        f"rl.algorithm.name={algorithm}", f"rl.algorithm.kl_coef={0.05 if algorithm == 'ppo' else 0}",
        *(f"roles.{role}.cpus_per_worker=0.3" for role in roles), "engine.cpus_per_worker=0.3",
        "roles.actor.optimizer.learning_rate=1e-3", "roles.critic.optimizer.learning_rate=1e-3",
        f"roles.actor.threads={2 if mode == 'synchronous' and algorithm == 'grpo' else 1}", *MODES[mode],
        "engine.eager=false",
    ]  # fmt: skip
    command = [
        str(Path(sys.executable).parent / "quartet"),
        "train",
        str(empty_run(work)),
        *overrides,
        "--fresh",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_s"] for line in lines if "step_s" in line]
    return statistics.median(seconds[WARM_UP:])


def empty_run(work: Path) -> Path:
    file = work / "run.yaml"
    file.write_text("name: versus-trl\nrl: {}\n")
    return file


def trl_step(work: Path, algorithm: str, steps: int, args: argparse.Namespace) -> float:
    """Median seconds of the warm steps of one run of the peer."""
    extra = ["--reward", "model", "--beta", "0.05"] if algorithm == "ppo" else []
    command = [
        args.trl_python, str(args.peers / f"trl_{algorithm}.py"), "--model", str(work / "model"),
        "--batch", "8", "--group", "4", "--length", "64", "--steps", str(steps), "--threads", "2",
        "--free-length", "--out", str(work / "trl-out"), *extra,
    ]  # fmt: skip
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=args.peers)
    return float(json.loads(result.stdout.strip().splitlines()[-1])["sec_per_step_median"])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=["grpo", "ppo"], required=True)
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with TRL")
    parser.add_argument("--peers", type=Path, required=True, help="folder with the baseline scripts")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        make_model(work / "scorer", classifier=True)
        seconds: dict[str, list[float]] = {name: [] for name in [*args.modes, "trl"]}
        for run in range(args.runs):
            for mode in args.modes:
                seconds[mode].append(quartet_step(work, args.algorithm, args.steps, mode))
            seconds["trl"].append(trl_step(work, args.algorithm, args.steps, args))
            figures = "  ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items())
            print(f"run {run + 1}: {figures}", file=sys.stderr, flush=True)
    report = {
        "algorithm": args.algorithm, "runs": args.runs, "steps": args.steps,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "speedup": {
            mode: spread([t / o for o, t in zip(seconds[mode], seconds["trl"], strict=True)])
            for mode in args.modes
        },
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
