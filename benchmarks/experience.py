"""Seconds on one thread that the driver spends between scores and updates, for 1,024 x 4,096 tokens.

    python benchmarks/experience.py

float32, ragged lengths, one turn each (--gaps: with tokens of the environment between two turns); medians of
seven. Beside them, in the same process, GAE as most write it: a Python loop over time. Writes
benchmarks/results/experience_cpu.json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from launch.bench.result import cpu_model  # noqa: E402
from orchestrator.algorithms.grpo import GRPO  # noqa: E402
from orchestrator.algorithms.ppo import PPO  # noqa: E402
from orchestrator.batch import Batch  # noqa: E402
from orchestrator.estimators import gae, whiten  # noqa: E402
from orchestrator.minibatch import token_weights  # noqa: E402

SEQUENCES, TOKENS, SIBLINGS, RUNS = 1024, 4096, 8, 7
TARGETS_S = {"gae_whiten": 0.1, "experience_ppo": 0.3, "experience_grpo": 0.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gaps", action="store_true")
    parser.add_argument("--no-file", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch, scores = inputs(gaps=arguments.gaps)
    rewards, values, mask = scores["reference"], scores["critic"], batch.action_mask
    work = {
        "gae_loop_over_time": lambda: loop_over_time(rewards, values, mask, 1.0, 0.95),
        "gae": lambda: gae(rewards, values, mask, gamma=1.0, lam=0.95),
        "gae_whiten": lambda: whiten(gae(rewards, values, mask, gamma=1.0, lam=0.95)[0], mask),
        "experience_ppo": lambda: experience(PPO(), batch, scores),
        "experience_grpo": lambda: experience(GRPO(kl_coef=0.001), batch, scores),
    }
    seconds = {name: median(call) for name, call in work.items()}
    result = {
        "sequences": SEQUENCES, "tokens": TOKENS, "dtype": "float32", "threads": 1, "runs": RUNS,
        "gaps": arguments.gaps, "torch": torch.__version__, "cpu": cpu_model(),
        "median_s": {name: round(value, 4) for name, value in seconds.items()},
        "target_s": TARGETS_S,
        "met": {name: seconds[name] < target for name, target in TARGETS_S.items()},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if not arguments.no_file:
        file = ROOT / "benchmarks" / "results" / "experience_cpu.json"
        file.write_text(json.dumps(result, indent=1) + "\n")


def inputs(*, gaps: bool) -> tuple[Batch, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, TOKENS)
    columns = torch.arange(TOKENS)
    lengths = torch.randint(TOKENS // 4, TOKENS + 1, (SEQUENCES, 1), generator=generator)
    attention = columns < lengths
    mask = attention & (columns >= 128)
    if gaps:
        mask &= (columns < 600) | (columns >= 800)
    batch = Batch(
        tokens=torch.zeros(shape, dtype=torch.int64), attention_mask=attention, action_mask=mask,
        rollout_logprobs=torch.randn(shape, generator=generator),
        rewards=torch.randn(SEQUENCES, generator=generator), groups=torch.arange(SEQUENCES) // SIBLINGS,
        versions=torch.zeros(SEQUENCES, dtype=torch.int64),
        stopped=torch.ones(SEQUENCES, dtype=torch.bool), baselines=None,
    )  # fmt: skip
    roles = ("actor", "reference", "critic")
    return batch, {role: torch.randn(shape, generator=generator) for role in roles}


def experience(algorithm: PPO | GRPO, batch: Batch, scores: dict[str, torch.Tensor]) -> None:
    """KL, rewards per token, advantages, returns and figures of the log; then the weights of the tokens."""
    used = scores if algorithm.has_critic else {k: v for k, v in scores.items() if k != "critic"}
    algorithm.experience(batch, used, algorithm.kl_coef)
    token_weights(batch.action_mask, algorithm.aggregate)


def loop_over_time(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """[B, T] one step of the recursion after the other; tokens off the mask hand on what they were given."""
    advantages = torch.zeros_like(values)
    carried, value = torch.zeros(len(values)), torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * value - values[:, t]
        carried = torch.where(here, delta + gamma * lam * carried, carried)
        value = torch.where(here, values[:, t], value)
        advantages[:, t] = torch.where(here, carried, 0.0)
    return advantages


def median(call) -> float:
    call()
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
