"""What a user sees of a run: a header per stage, a line per step, a closing block; and samples.jsonl beside
it.

On a terminal the step line is rewritten in place; in a log file every step is a line of its own. Example:

    step 12/60  reward 0.83  kl 0.012  len 6.1  tok/s 2310  | generate 0.41 update 0.32 driver 0.02 s
    sft step 40/120  loss 0.831  tok/s 5120
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from orchestrator import metrics as names
from orchestrator.batch import ScoredRollout
from orchestrator.timeline import Phase

START_OF_LINE, CLEAR_TO_END = "\r", "\x1b[K"

# What the step line shows, in this order, where the step has it: metric, label, format.
COLUMNS = (
    (names.LOSS, "loss", ".3f"),
    (names.REWARD, "reward", ".2f"),
    (names.ACCURACY, "accuracy", ".3f"),
    (names.KL, "kl", ".3f"),
    (names.RESPONSE_TOKENS, "len", ".1f"),
    (names.TOKENS_PER_S, "tok/s", ".0f"),
)


class Progress:
    """Prints to ``stream``; knows only whether a line is open that must end before the next text."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._in_place = self._stream.isatty()
        self._line_is_open = False

    def header(self, text: str) -> None:
        """Opens a stage: ``progress.header("rl: ppo, 60 steps")``."""
        self._print(f"\n== {text}")

    def step(self, stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        line = step_line(stage, step, steps, metrics)
        if not self._in_place:
            self._print(line)
            return
        width = shutil.get_terminal_size().columns
        self._stream.write(START_OF_LINE + line[: width - 1] + CLEAR_TO_END)
        self._stream.flush()
        self._line_is_open = True

    def note(self, text: str) -> None:
        """One line that stays: an evaluation, a checkpoint, a recovery."""
        self._print(text)

    def summary(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The closing block, its values aligned."""
        self._print(f"\n== {title}\n" + summary_block(rows))

    def _print(self, text: str) -> None:
        end_of_step_line = "\n" if self._line_is_open else ""
        self._stream.write(f"{end_of_step_line}{text}\n")
        self._stream.flush()
        self._line_is_open = False


def step_line(stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """The line of one step. The rl stage goes without its name; seconds follow the bar in the order of the
    phases."""
    parts = [f"step {step}/{steps}" if stage == "rl" else f"{stage} step {step}/{steps}"]
    parts += [f"{label} {metrics[name]:{form}}" for name, label, form in COLUMNS if name in metrics]
    seconds = [
        f"{phase} {metrics[names.SECONDS + phase]:.2f}" for phase in Phase if names.SECONDS + phase in metrics
    ]
    if names.DRIVER_S in metrics:
        seconds.append(f"driver {metrics[names.DRIVER_S]:.2f}")
    if seconds:
        parts.append(f"| {' '.join(seconds)} s")
    return "  ".join(parts)


def summary_block(rows: Sequence[tuple[str, str]]) -> str:
    """Label and value per line: [("reward", "0.91"), ("run", "runs/x")] aligned on the longest label."""
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"   {label:<{width}}  {value}" for label, value in rows)


def write_samples(file: Path, step: int, scored: Sequence[ScoredRollout]) -> None:
    """Appends to samples.jsonl what the policy said, one sequence per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        for sample in scored:
            prompt = sample.rollout.prompt
            line = {
                "step": step,
                "uid": sample.rollout.uid,
                "prompt": prompt.text,
                "response": sample.rollout.text,
                "label": prompt.label,
                "reward": sample.reward,
            }
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
