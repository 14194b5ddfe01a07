"""What it saves to compute every token of a micro-batch once (actors/shared_prefix.py), against rows.

    python benchmarks/shared_prefix.py --model models/smollm2 --out benchmarks/results/shared_prefix_epyc.json

Samples of prompts of several lengths, ``--samples`` each, with responses of ``--response-tokens``, all in one
micro-batch: forward and backward pass as in a policy's update, and the forward pass as in scoring. Both ways
in turn, in one process with the allocator's settings of a worker. Random tokens: which ones takes no time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from actors.threads import openmp  # noqa: E402
from launch.environment import MODEL_ENV  # noqa: E402


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Runs in its own process."""
    import torch

    from actors.model import PolicyModel
    from launch.bench.result import machine, versions
    from orchestrator.config import Model

    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    policy = PolicyModel.load(Model(path=asked.model, dtype=asked.dtype))
    assert policy._apart  # else it was never given anything but rows
    found: dict[str, Any] = {}
    for length in asked.prompt_tokens:
        shape = asked.prompts * asked.samples, asked.response_tokens
        prompts = torch.randint(0, 1000, (asked.prompts, length)).repeat_interleave(asked.samples, 0)
        tokens = torch.cat([prompts, torch.randint(0, 1000, shape)], 1)
        kept = torch.ones_like(tokens, dtype=torch.bool)
        asked_for = kept & (torch.arange(tokens.shape[1]) >= length)
        given = tokens, kept, asked_for, 1.0

        def update(given: tuple[Any, ...] = given) -> None:
            mean = torch.tensor(-1 / given[2].sum())
            slopes = lambda logprobs, entropy: (mean.expand_as(logprobs), torch.zeros_like(entropy))  # noqa: E731
            policy(*given, False, False, None, slopes)[3].backward()

        def score(given: tuple[Any, ...] = given) -> None:
            with torch.no_grad():
                policy(*given)

        for work in (update, score):
            seconds: dict[str, list[float]] = {"once": [], "rows": []}
            for _ in range(1 + asked.runs):
                for way, several in seconds.items():
                    policy._apart = way == "once"
                    several.append(timed(work))
            warm = {way: several[1:] for way, several in seconds.items()}
            ratio = statistics.median(b / a for a, b in zip(warm["once"], warm["rows"], strict=True))
            found[f"{work.__name__} of {length} + {asked.response_tokens} tokens"] = {
                "seconds": warm, "times_as_fast": ratio,
            }  # fmt: skip
    settings = {name: value for name, value in vars(asked).items() if name not in ("out", "inside")}
    return {"machine": machine(), "versions": versions(), "settings": settings, "found": found}


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a causal model")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a result file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.inside:
        env = os.environ | MODEL_ENV | openmp(asked.threads)
        sys.exit(subprocess.run([sys.executable, *sys.argv, "--inside"], env=env).returncode)
    text = json.dumps(measured(asked), indent=1, default=str) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
