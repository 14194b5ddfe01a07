"""What a weight sync costs when the actor trains LoRA: merged weights against A and B alone, on an engine.

    python benchmarks/adapter_sync.py --model models/smollm2 --out benchmarks/results/adapter_sync_cpu.json

Bytes are those of the receipts, seconds the medians of ``--syncs`` updates (send, receive, in force, cache
reset) after one to warm up; ``probe_diff`` is the mean difference in nats of 64 tokens between engine and
actor.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
from actors.actor import Actor
from actors.engine import EngineWorker
from actors.weights.wire import ServedAdapter
from orchestrator.batch import Examples, Loss, Minibatch, Prompt
from orchestrator.config import Adapter, EngineConfig, Model, Optimizer
from orchestrator.publish import check_receipt
from orchestrator.roles import Sampling

PROBE = tuple(range(100, 164))
MAX_LENGTH = 256


def nll(policy, part):
    return Loss(values=-policy.logprobs, metrics={})


def step(actor):
    tokens = torch.tensor([PROBE[::-1]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    records = Examples(tokens=tokens, attention_mask=mask | True, action_mask=mask)
    weights = mask / mask.sum()
    actor.update(Minibatch(records=records, rows=torch.arange(1), weights=weights), [[0]])


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


async def measure(actor, model, receive, rank, syncs):
    served = ServedAdapter(rank=rank, alpha=16, layers=LAYERS) if receive == "adapter" else None
    engine = EngineWorker(
        config=EngineConfig(kv_cache_mb=128, receive=receive), model=model, revision=None, dtype="float32",
        max_length=MAX_LENGTH, index=0, device="cpu", transport="gloo",
        adapter=served,
    )  # fmt: skip
    await engine.start()
    await engine.join_weights(actor.open_channel("gloo", "float32", 64, 2, 120, served), 1)
    seconds = []
    for version in range(syncs + 1):
        step(actor)
        begin = time.perf_counter()
        sent, (received,) = await asyncio.gather(
            asyncio.to_thread(actor.send_weights, version), engine.receive_weights(version)
        )
        await engine.commit_weights(version)
        seconds.append(time.perf_counter() - begin)
        check_receipt(sent, received)
    pairs = zip(await engine.logprobs(PROBE), actor.logprobs(PROBE), strict=True)
    diff = statistics.mean(abs(a - b) for a, b in pairs)
    prompt = Prompt(uid="0/0", row=0, tokens=PROBE[:16], text="", label=None)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=64)
    begin = time.perf_counter()
    rollouts = await engine.generate(prompt, 16, sampling, list(range(16)))
    tokens = sum(sum(rollout.action_mask) for rollout in rollouts)
    speed = tokens / (time.perf_counter() - begin)
    await engine.close()
    return {
        "bytes": sent.num_bytes, "tensors": len(sent.checksums),
        "sync_s": round(statistics.median(seconds[1:]), 4),
        "probe_diff": diff, "generate_tokens_per_s": round(speed, 1),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--syncs", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = Model(path=arguments.model, dtype="float32", adapter=Adapter(rank=arguments.rank))
    actor = Actor(model=model, optimizer=Optimizer(learning_rate=1e-3), total_steps=999, loss=nll)
    actor.setup(0, 1, *actor.rendezvous(), threads=1, seed=0, timeout_s=120)
    report = {
        "model": Path(arguments.model).name,
        "rank": arguments.rank,
        "dtype": "float32",
        "syncs": arguments.syncs,
    }
    for receive in ("weights", "adapter"):
        report[receive] = asyncio.run(
            measure(actor, arguments.model, receive, arguments.rank, arguments.syncs)
        )
    report["times_fewer_bytes"] = round(report["weights"]["bytes"] / report["adapter"]["bytes"], 1)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
