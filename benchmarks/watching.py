"""What it costs to be watched: updates of a policy in a Ray worker with a pulse, and in one without.

    python benchmarks/watching.py --model models/smollm2 --out benchmarks/results/watching_cpu.json

Both workers live in one Ray, hold the same model, take the same update in turn, and begin in turn, so that a
busy machine slows both. ``watched`` is a worker as a run starts it: verbs in a thread of Ray's, a pulse asked
for five times in ``deadlines.silence_s``. ``plain`` runs its verbs in the main thread and is asked for
nothing else. ``overhead`` is the median of the rounds' ratios, less 1.
"""

import argparse
import asyncio
import json
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
import ray
import torch
from ray.actor import ActorMethod
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.actor import Actor
from actors.recording import recorded
from actors.remote_worker import RemoteWorker, spawn
from actors.ward import Ward
from launch.bench.phases import Workload, experience
from launch.environment import MODEL_ENV, WORKER_ENV
from orchestrator.algorithms import grpo
from orchestrator.balance import plan
from orchestrator.config import Deadlines, Model, Optimizer
from orchestrator.placement import Seat
from orchestrator.work import Recorded, WorkBook

ROOT = Path(__file__).parents[1]


async def started(group, settings, env, threads) -> tuple[RemoteWorker, ray.actor.ActorHandle]:
    ward = Ward(Path(tempfile.mkdtemp()), lambda incident: None, lambda lines: None, WorkBook())
    seat = Seat(group=0, bundle=0, resources={"CPU": 1.0})
    watched = spawn(
        Actor,
        who="actor rank 0",
        seat=seat,
        group=group,
        env=env,
        deadlines=Deadlines(),
        ward=ward,
        **settings,
    )
    options = {
        "num_cpus": 1,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=1),
        "runtime_env": {"env_vars": env},
    }
    plain = ray.remote(recorded(Actor)).options(**options).remote(**settings)
    watched.attend([await watched.call(watched.handle.describe)], ready=True)
    for handle in (watched.handle, plain):
        host, port = await handle.rendezvous.remote()
        await handle.setup.remote(0, 1, host, port, threads, 0, 600.0)
    return watched, plain


async def seconds(verb: ActorMethod, *args: object) -> float:
    """Inside the worker, by its own clock."""
    answer = await verb.remote(*args)
    assert isinstance(answer, Recorded)
    return answer.end - answer.begin


async def measure(options: argparse.Namespace) -> dict[str, object]:
    work = Workload(
        model=options.model, dtype="float32", num_prompts=options.sequences, samples=1, prompt_tokens=64,
        response_tokens=options.tokens - 64, threads=options.threads,
    )  # fmt: skip
    model = Model(path=work.model, dtype=work.dtype, max_length=work.length)
    records = experience(work, model_vocab(work.model))
    shares = plan([work.length] * work.num_sequences, num_ranks=1, token_budget=work.micro_batch_tokens)[0]
    settings = {
        "model": model, "optimizer": Optimizer(learning_rate=1e-6), "total_steps": 1000,
        "loss": grpo.CONFIG(kl_coef=0.0).policy_loss,
    }  # fmt: skip
    env = {**WORKER_ENV, **MODEL_ENV, "OMP_NUM_THREADS": str(work.threads), "PYTHONPATH": str(ROOT)}
    group = placement_group([{"CPU": 1}, {"CPU": 1}])
    await group.ready()
    watched, plain = await started(group, settings, env, work.threads)
    update = [
        ray.put(records),
        torch.arange(work.num_sequences),
        records.action_mask / records.action_mask.sum(),
        shares,
    ]
    sides: dict[str, list[float]] = {"watched": [], "plain": []}
    verbs = {"watched": watched.handle.update_rows, "plain": plain.update_rows}
    began = time.monotonic()
    for round_ in range(options.rounds + 1):
        for name in sorted(verbs, reverse=round_ % 2 == 1):
            took = await seconds(verbs[name], *update)
            if round_:  # the first warms up
                sides[name].append(took)
    ratios = [a / b for a, b in zip(sides["watched"], sides["plain"], strict=True)]
    watched.dismiss()
    return {
        "model": Path(options.model).name, "tokens": work.num_sequences * work.length,
        "threads": work.threads, "rounds": options.rounds, "wall_s": round(time.monotonic() - began, 1),
        "overhead": statistics.median(ratios) - 1, "ratios": [round(ratio, 4) for ratio in ratios],
        "median_s": {name: round(statistics.median(taken), 4) for name, taken in sides.items()},
        "seconds": {name: [round(one, 4) for one in taken] for name, taken in sides.items()},
    }  # fmt: skip


def model_vocab(path: str) -> int:
    return int(json.loads((Path(path) / "config.json").read_text())["vocab_size"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="of each sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runtime = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=runtime
    )
    report = asyncio.run(measure(options))
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
