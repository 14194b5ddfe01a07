"""What it costs to be watched and checked, in seconds of processor time, as a share of an update.

    python benchmarks/watching.py --model models/smollm2 --out benchmarks/results/watching_cpu.json

Processor time is counted and not wall time compared: two updates of one process differ by more than what is
looked for. ``watch``: of driver and worker together, for each second that the worker is watched (a pulse five
times in ``deadlines.silence_s``), less that of the same two processes idle and not watched. Once a step:
``finite`` (the look at every weight), ``checksum`` (of every weight, at both ends), ``probe`` (a forward pass
at both ends) and ``batch`` (the look at scores and rewards). ``share`` is of the update alone; generation,
scores and the sync itself make a step longer.
"""

import argparse
import asyncio
import json
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
import psutil
import ray
import torch
from ray.util.placement_group import placement_group

from actors.actor import Actor
from actors.remote_worker import RemoteWorker, spawn
from actors.ward import Ward
from actors.weights.checksum import checksum
from launch.bench.phases import Workload, experience
from launch.environment import MODEL_ENV, WORKER_ENV
from launch.rl_stage import PROBE_TOKENS
from orchestrator.algorithms import grpo
from orchestrator.balance import plan
from orchestrator.config import Deadlines, Model, Optimizer
from orchestrator.placement import Seat
from orchestrator.work import WorkBook

ROOT = Path(__file__).parents[1]


def processor_seconds(work: Callable[[], object], rounds: int) -> float:
    """Of all threads of this process; the median after one round that warms up."""
    taken = []
    for _ in range(rounds + 1):
        before = time.process_time()
        work()
        taken.append(time.process_time() - before)
    return statistics.median(taken[1:])


class Checked(Actor):
    """An actor that counts what an update and everything that is looked at once in a step cost it."""

    def count(self, work: Workload, rounds: int) -> dict[str, float]:
        records = experience(work, model_vocab(work.model))
        num_rows, budget = work.num_sequences, work.micro_batch_tokens
        shares = plan([work.length] * num_rows, num_ranks=1, token_budget=budget)[0]
        rows, weights = torch.arange(num_rows), records.action_mask / records.action_mask.sum()
        named = dict(self.backend.named_full_parameters())
        looks = {
            "update": lambda: self.update_rows(records, rows.numpy(), weights.numpy(), shares),
            "finite": self.backend.check_finite,
            "checksum": lambda: [checksum(tensor) for tensor in named.values()],
            "probe": lambda: self.logprobs(range(PROBE_TOKENS)),
            "batch": lambda: [column.isfinite().all() for column in (records.rollout_logprobs,) * 4],
        }
        return {name: processor_seconds(look, rounds) for name, look in looks.items()}


async def started(settings: dict[str, object], env: dict[str, str], threads: int) -> RemoteWorker:
    group = placement_group([{"CPU": 1}])
    await group.ready()
    ward = Ward(Path(tempfile.mkdtemp()), lambda incident: None, lambda lines: None, WorkBook())
    seat = Seat(group=0, bundle=0, resources={"CPU": 1.0})
    worker = spawn(
        Checked, who="actor rank 0", seat=seat, group=group, env=env, deadlines=Deadlines(), ward=ward,
        **settings,
    )  # fmt: skip
    host, port = await worker.call(worker.handle.rendezvous)
    await worker.call(worker.handle.setup, 0, 1, host, port, threads, 0, 600.0)
    return worker


async def watching(worker: RemoteWorker, seconds: float) -> dict[str, float]:
    """Processor seconds per second of both processes: watched, and before that only there."""
    lines = [await worker.call(worker.handle.describe)]
    both = [psutil.Process(), psutil.Process(lines[0].pid)]

    async def used() -> float:
        before = [process.cpu_times() for process in both]
        await asyncio.sleep(seconds)
        after = [process.cpu_times() for process in both]
        spent = (b.user + b.system - a.user - a.system for a, b in zip(before, after, strict=True))
        return sum(spent) / seconds

    await asyncio.sleep(2)  # what starting has left to do
    alone = await used()
    worker.attend(lines, ready=True)
    return {"alone": alone, "watched": await used()}


async def measure(options: argparse.Namespace) -> dict[str, object]:
    work = Workload(
        model=options.model, dtype="float32", num_prompts=options.sequences, samples=1, prompt_tokens=64,
        response_tokens=options.tokens - 64, threads=options.threads,
    )  # fmt: skip
    settings = {
        "model": Model(path=work.model, dtype=work.dtype, max_length=work.length),
        "optimizer": Optimizer(learning_rate=1e-6), "total_steps": 1000,
        "loss": grpo.CONFIG(kl_coef=0.0).policy_loss,
    }  # fmt: skip
    env = {**WORKER_ENV, **MODEL_ENV, "OMP_NUM_THREADS": str(work.threads), "PYTHONPATH": str(ROOT)}
    worker = await started(settings, env, work.threads)
    watch = await watching(worker, options.seconds)
    seconds = await worker.call(worker.handle.count, work, options.rounds)
    worker.end()
    guards = 2 * seconds["checksum"] + 2 * seconds["probe"] + seconds["finite"] + seconds["batch"]
    per_second = watch["watched"] - watch["alone"]
    return {
        "model": Path(options.model).name, "tokens": work.num_sequences * work.length,
        "threads": work.threads, "rounds": options.rounds, "watch": watch, "watch_per_second": per_second,
        "processor_s": seconds, "guards_per_step_s": guards,
        "share": per_second + guards / seconds["update"],
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30, help="for which a worker is watched")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runtime = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
        runtime_env=runtime,
    )  # fmt: skip
    report = asyncio.run(measure(options))
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
