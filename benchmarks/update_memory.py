"""Peak memory of one actor update: log-probs by blocks of the vocabulary against all logits at once.

    python benchmarks/update_memory.py --model models/smollm2 --out benchmarks/results/update_memory_cpu.json

Each side is a process of its own that loads the model and takes one policy-gradient step (forward, backward,
AdamW) on ``--tokens`` tokens of 512 each in one micro-batch, gradient checkpointing on; what differs is where
the log-probs come from: ``blocks`` is ``actors.model`` as it trains, ``logits`` is Transformers' own forward
and a log-softmax over [tokens, vocabulary]. ``peak_mb`` is the largest resident size minus that of the loaded
model; ``whole_mb`` the largest resident size. Prints the loss as well: both must train on the same number.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

LENGTH = 512


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def one_side(model: str, tokens: int, side: str) -> dict[str, float]:
    """Runs in its own process."""
    import torch

    from actors.model import PolicyModel
    from orchestrator.config import Model

    torch.set_num_threads(2)
    torch.manual_seed(0)
    source = Model(path=model, dtype="float32", max_length=LENGTH, gradient_checkpointing=True)
    policy = PolicyModel.load(source).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    ids = torch.randint(0, policy.model.config.vocab_size, (tokens // LENGTH, LENGTH))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    weights = torch.randn(ids.shape)
    before, start = resident_mb(), time.perf_counter()
    if side == "blocks":
        logprobs = policy(ids, everywhere, everywhere, 1.0)[0][:, 1:]
    else:
        head = policy.model.get_output_embeddings()
        states = policy.hidden_states(ids, everywhere)
        every = torch.nn.functional.linear(states, head.weight)[:, :-1].log_softmax(-1)
        logprobs = every.gather(-1, ids[:, 1:, None]).squeeze(-1)
        del every
    loss = (weights[:, 1:] * logprobs).mean()
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "peak_mb": round(peak - before), "whole_mb": round(peak), "loss": loss.item(),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["blocks", "logits"], help="only this one, in this process")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args.model, args.tokens, args.side)))
        return
    report: dict[str, object] = {"tokens": args.tokens, "length": LENGTH}
    sides = {}
    for side in ("logits", "blocks"):
        command = [sys.executable, "-m", "benchmarks.update_memory", "--model", args.model]
        command += ["--tokens", str(args.tokens), "--side", side]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        report[side] = sides[side] = json.loads(result.stdout.splitlines()[-1])
    for figure in ("peak_mb", "whole_mb"):
        report[f"{figure}_ratio"] = round(sides["blocks"][figure] / sides["logits"][figure], 3)
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
