"""The whole step, by layout: the same run, its roles on devices of their own, on shared ones, asynchronous.

Every layout is a run of ``quartet train`` in a process of its own, one after the other, ``ROUNDS`` times in
turn, so that a machine that gets slower slows all of them. Other sizes of roles are overrides of the run:
``quartet bench step --run mine.yaml --set engine.replicas=2 roles.actor.workers=2``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch.bench.result import Better, Figure
from launch.tracking import read_metrics
from orchestrator import metrics as names

LAYOUTS: dict[str, list[str]] = {
    "separate": ["placement.share=[]", "rl.staleness=0"],
    "shared": ["placement.share=[[actor,reference,reward,critic]]", "rl.staleness=0"],
    "asynchronous": ["placement.share=[]", "rl.staleness=1"],
}
ROUNDS = 2
WARM_UP = 2  # steps that do not count
SHOWN: dict[str, tuple[str, Better]] = {
    names.TOKENS_PER_S: ("1/s", "higher"),
    names.STEP_S: ("s", "lower"),
    names.DEVICE + "useful": ("of the device time", "higher"),
    names.SCORING_HIDDEN: ("of the scoring", "higher"),
    names.OVERHEAD_FRACTION: ("of the step", "lower"),
}


def measure(run: Sequence[str], overrides: Sequence[str]) -> list[Figure]:
    """``run``: as ``quartet train`` takes it; it needs an rl stage of at least WARM_UP + 1 steps."""
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for layout, settings in LAYOUTS.items():
            for line in _steps([*run, *overrides, *settings]):
                for name in SHOWN:
                    if line.get(name) is not None:
                        samples.setdefault((layout, name), []).append(line[name])
    return [
        Figure(name=f"step/{layout}/{name}", unit=SHOWN[name][0], better=SHOWN[name][1], samples=values)
        for (layout, name), values in samples.items()
    ]


def _steps(words: Sequence[str]) -> list[dict[str, float]]:
    """The warm rl steps of a run; RuntimeError with its output when it fails or has none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.cli", "train", *words, f"run_dir={folder}/run"]
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        lines = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    steps = [line for line in lines if line["stage"] == "rl" and names.STEP_S in line][WARM_UP:]
    if not steps:
        raise RuntimeError(f"{' '.join(words)} made no more than {WARM_UP} rl steps; set rl.steps higher")
    return steps
