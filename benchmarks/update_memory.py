"""Peak memory of one actor update: log-probs by blocks of the vocabulary against all logits at once.

    python benchmarks/update_memory.py --model models/smollm2 --out benchmarks/results/update_memory_cpu.json

Each side is a process of its own with the ``Actor`` of a run (DeepSpeed, AdamW, float32, gradient
checkpointing, the allocator's settings of a worker) and its second update: ``--tokens`` tokens, 512 a row, in
one micro-batch, every token asked for. ``blocks`` is the actor as it trains; ``logits`` is the same with
``TokenHead`` told to keep [tokens, vocabulary] whole, which is what it does for small batches.

    resident_mb   tensors that the model holds between updates: weights and both moments
    above_mb      most bytes of tensors alive beyond that, in each phase and in all (torch's allocations)
    process_mb    largest resident size of the process in the update: with Python, the allocator's gaps and
                  the profiler's notes

Prints the loss as well: both must train on the same number. 4,096 tokens take two minutes on a core.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from launch.environment import MODEL_ENV  # noqa: E402

LENGTH = 512
PHASE = "phase: "
MIB = 2**20


def process_mb(key: str) -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def named_phase(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``call`` as a span of the profiler."""
    from torch.autograd.profiler import record_function

    def spanned(*arguments: Any, **named: Any) -> Any:
        with record_function(PHASE + name):
            return call(*arguments, **named)

    return spanned


def above_mb(update: Callable[[], None]) -> dict[str, int]:
    """Most bytes of tensors alive beyond those at the start, by phase."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        update()
    events = found.profiler.kineto_results.events()
    spans = [(e.start_ns(), e.end_ns(), e.name()) for e in events if e.name().startswith(PHASE)]
    alive, peaks = 0, {"all": 0}
    for at, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        alive += change
        inside = [name for begin, end, name in spans if begin <= at <= end]
        for name in ("all", *inside):
            peaks[name] = max(peaks.get(name, 0), alive)
    return {name.removeprefix(PHASE): round(peak / MIB) for name, peak in peaks.items()}


def one_side(model: str, tokens: int, side: str) -> dict[str, Any]:
    """Runs in its own process."""
    import torch

    import actors.heads
    from actors.actor import Actor
    from orchestrator.algorithms import grpo
    from orchestrator.batch import Experience, Minibatch
    from orchestrator.config import Model, Optimizer

    if side == "logits":
        actors.heads.LOGITS_KEPT = 2**60
    source = Model(path=model, dtype="float32", max_length=LENGTH, gradient_checkpointing=True)
    algorithm = grpo.CONFIG(kl_coef=0.0)
    actor = Actor(
        model=source, optimizer=Optimizer(learning_rate=1e-6), total_steps=8, loss=algorithm.policy_loss,
        token_wise=algorithm.loss_is_token_wise,
    )  # fmt: skip
    host, port = actor.rendezvous()
    actor.setup(0, 1, host, port, int(os.environ["OMP_NUM_THREADS"]), 0, 600.0)

    def update(rows: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        mask = torch.ones(rows, LENGTH, dtype=torch.bool)
        records = Experience(
            tokens=torch.randint(0, 49152, mask.shape, generator=generator), attention_mask=mask,
            action_mask=mask, rollout_logprobs=torch.zeros(mask.shape), old_logprobs=None,
            advantages=torch.randn(rows, 1, generator=generator) * mask, old_values=None, returns=None,
            ref_logprobs=None,
        )  # fmt: skip
        minibatch = Minibatch(records=records, rows=torch.arange(rows), weights=mask / mask.sum())
        return actor.update(minibatch, [list(range(rows))])

    update(1)  # makes the moments: every step but the first has them
    kept = list(actor.backend.engine.module.parameters())
    kept += [t for state in actor.backend.optimizer.state.values() for t in state.values()]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    actor.output = named_phase(actor.output, "forward")  # type: ignore[method-assign]
    actor.loss = named_phase(actor.loss, "loss")
    actor.backend.accumulate = named_phase(actor.backend.accumulate, "backward")  # type: ignore[method-assign]
    actor.backend.step = named_phase(actor.backend.step, "step")  # type: ignore[method-assign]
    told: dict[str, float] = {}
    above = above_mb(lambda: told.update(update(tokens // LENGTH)))
    return {
        "loss": told["loss"],
        "resident_mb": round(sum(t.numel() * t.element_size() for t in kept) / MIB),
        "above_mb": above,
        "process_mb": round(process_mb("VmHWM")),
    }


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
    environment = {"OMP_NUM_THREADS": "2", **os.environ, **MODEL_ENV}
    report: dict[str, Any] = {
        "tokens": args.tokens, "length": LENGTH, "threads": int(environment["OMP_NUM_THREADS"])
    }  # fmt: skip
    for side in ("logits", "blocks"):
        command = [sys.executable, __file__, "--model", args.model, "--tokens", str(args.tokens)]
        result = subprocess.run(
            [*command, "--side", side], check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        report[side] = json.loads(result.stdout.splitlines()[-1])
    blocks, logits = report["blocks"], report["logits"]
    report["above_ratio"] = round(blocks["above_mb"]["all"] / logits["above_mb"]["all"], 3)
    report["process_ratio"] = round(blocks["process_mb"] / logits["process_mb"], 3)
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
