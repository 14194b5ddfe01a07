"""Where reward functions are found, and the process they run in.

A function of the user's may loop for ever, end its process, fork, or take all memory. It runs in a child
(``reward_child.py``) with a limit on the time of each answer and on memory; what it does there costs its
child, and the error names the sample. That bounds accidents; it is no sandbox against an attacker
(SECURITY.md).
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from actors.remote_reward import Question, RemoteReward
from orchestrator.batch import Rollout
from orchestrator.secret import without_secrets

RewardFunction = Callable[[str, str, str | None], float]  # (response, prompt, label) -> reward

LONGEST_LINE = 2**16  # of an answer
AT_ONCE = 64  # questions sent before their answers are read: a pipe holds 64 kB


class RewardFunctionError(ValueError):
    """A function failed, hung or ended its process; the message names the sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of a reward function's child process."""

    start_s: float = 120.0  # imports
    answer_s: float = 60.0
    memory_mb: int = 8192  # address space


class ChildFunction:
    """A function in a process of its own, which starts with the first question and again after its end."""

    def __init__(self, spec: str, limits: Limits | None = None) -> None:
        """Starts the child once; ValueError when there is no such function."""
        self.spec, self._limits = spec, limits or Limits()
        self._child: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._start()

    def __call__(self, response: str, prompt: str, label: str | None) -> float:
        return self.score_all([(response, prompt, label)], ["of this response"])[0]

    def score_all(self, questions: Sequence[Question], names: Sequence[str]) -> list[float]:
        """One answer per question; ``names`` of the samples are for the message. None where the function
        answered None: who gathers rewards refuses that, with the name of the reward."""
        if self._child is None:
            self._start()
        rewards: list[float] = []
        for start in range(0, len(questions), AT_ONCE):
            part = questions[start : start + AT_ONCE]
            self._send(json.dumps(part).encode() + b"\n", names[start])
            for name in names[start : start + len(part)]:
                answer = self._read(self._limits.answer_s, f"for sample {name}")
                if "error" in answer:
                    raise RewardFunctionError(
                        f"reward function {self.spec!r} failed for sample {name}: {answer['error']}"
                    )
                rewards.append(answer["reward"])
        return rewards

    def close(self) -> None:
        """Ends the child and whatever it has started."""
        child, self._child, self._unread = self._child, None, b""
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None:
            self.close()

    def _start(self) -> None:
        paths = [str(Path(__file__).parent.parent), *filter(None, sys.path)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "actors.reward_child", self.spec, str(self._limits.memory_mb),
             str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**without_secrets(os.environ), "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )  # fmt: skip
        answer = self._read(self._limits.start_s, "while it was loaded")
        if "refused" in answer:
            self.close()
            raise ValueError(answer["refused"])

    def _send(self, line: bytes, name: str) -> None:
        assert self._child is not None and self._child.stdin is not None
        try:
            view = memoryview(line)
            while view:
                view = view[self._child.stdin.write(view) :]
        except OSError:
            self._fail(f"for sample {name}", "its process is gone")

    def _read(self, limit_s: float, when: str) -> dict:
        """The next line; RewardFunctionError when it does not come in time or the process ends."""
        assert self._child is not None and self._child.stdout is not None
        until = time.monotonic() + limit_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self._fail(when, f"it took longer than {limit_s:g} s and was ended")
            more = os.read(self._child.stdout.fileno(), LONGEST_LINE)
            if not more:
                self._fail(when, "it ended its process (memory limit, os._exit or a crash)")
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return dict(json.loads(line))

    def _fail(self, when: str, what: str) -> None:
        self.close()
        raise RewardFunctionError(f"reward function {self.spec!r} failed {when}: {what}")


def find_reward_function(spec: str, limits: Limits | None = None) -> RewardFunction:
    """A file in actors/rewards/, package.module:name, or URLs with commas; else ValueError."""
    if spec.startswith(("http://", "https://")):
        return RemoteReward(spec.split(","))
    return ChildFunction(spec, limits)


def judge_all(function: RewardFunction, rollouts: Sequence[Rollout]) -> list[float]:
    """One reward per rollout; a service or a child is asked for all at once."""
    questions = [(r.text, r.prompt.text, r.prompt.label) for r in rollouts]
    if isinstance(function, RemoteReward):
        return function.score_all(questions)
    if isinstance(function, ChildFunction):
        return function.score_all(questions, [r.uid for r in rollouts])
    return [function(*question) for question in questions]
