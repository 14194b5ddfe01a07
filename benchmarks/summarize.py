"""The figures of a finished run as one JSON: seconds per phase, tokens per second, KL, reward and the rest.

    python benchmarks/summarize.py RUN_DIR > benchmarks/results/NAME.json

Reads ``metrics.jsonl`` and nothing else; the first step, which warms up, is left out of the medians.
"""

import json
import statistics
import sys
from pathlib import Path

FIGURES = (
    "reward", "kl", "response_tokens", "tokens_per_s", "step_s", "overhead_s", "overhead_fraction",
    "driver_fraction", "scoring_hidden", "sync_mb", "probe_diff", "rollout_logprob_diff_mean",
    "rollout_logprob_diff_max", "actor/clip_fraction", "actor/grad_norm", "critic/value_error",
)  # fmt: skip


def summarize(folder: Path) -> dict[str, object]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "rl" and "step_s" in line]
    heldout = [
        [line["stage"], line["step"], line["heldout_accuracy"]]
        for line in lines
        if "heldout_accuracy" in line
    ]
    warm = steps[1:]
    phases = sorted({name for line in warm for name in line if name.startswith("seconds/")})
    return {
        "rl_steps": len(steps),
        "heldout_accuracy": heldout,
        "median": {name: round(median(warm, name), 5) for name in (*FIGURES, *phases) if name in warm[0]},
        "per_step": [
            {name: round(line[name], 5) for name in ("step", "reward", "kl", "step_s")} for line in steps
        ],
    }


def median(lines: list[dict[str, float]], name: str) -> float:
    return statistics.median(line[name] for line in lines if name in line)


if __name__ == "__main__":
    print(json.dumps(summarize(Path(sys.argv[1])), indent=1))
