"""What is submitted, and what can be known of it afterwards.

An attempt has the id ``<run>-<attempt>``, the same on every target: submitting twice gives one job. The
state of the job is the truth; a log stream that ends says nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from pydantic import Field

from launch.graceful import CHECKPOINTED as CHECKPOINTED
from orchestrator.config import Run
from orchestrator.configfile import run_as_yaml
from orchestrator.settings import Settings


class State(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_over(self) -> bool:
        return self not in (State.PENDING, State.RUNNING)


# What `quartet status` and `quartet submit --wait` return. 2 is a refusal, 130 an interruption
# (launch/cli.py).
EXIT_CODES = {
    State.SUCCEEDED: 0,
    State.FAILED: 1,
    State.PENDING: 3,
    State.RUNNING: 3,
    State.STOPPED: 4,
}
NOT_FOUND = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One attempt as its target sees it, e.g. id "ppo-7b-1", FAILED, exit_code 2."""

    id: str
    state: State
    exit_code: int | None = None  # of the training process; None: not over, or the target does not know
    message: str = ""

    @property
    def attempt(self) -> int:
        return int(self.id.rsplit("-", 1)[1])

    @property
    def status(self) -> int:
        """The exit status of the command that asked: the process's own where it is known and not 0."""
        if self.state in (State.FAILED, State.STOPPED) and self.exit_code:
            return self.exit_code
        return EXIT_CODES[self.state]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One attempt at a run; ``resume`` goes on from its newest checkpoint."""

    run: Run
    attempt: int = 0
    resume: bool = False

    @property
    def id(self) -> str:
        return f"{self.run.name}-{self.attempt}"

    @property
    def config(self) -> str:
        """The resolved run, as the job reads it."""
        return run_as_yaml(self.run)


def entrypoint(config: str, *, resume: bool, secrets: dict[str, str], python: str = "python") -> list[str]:
    """The command of the training process, the same on every target; ``secrets`` are files on its machine."""
    argv = [python, "-m", "launch.submit.enter", config]
    if resume:
        argv.append("--resume")
    for name, file in sorted(secrets.items()):
        argv += ["--secret", f"{name}={file}"]
    return argv


def shell(argv: Sequence[str]) -> str:
    return shlex.join(argv)


def attempts(reports: Sequence[Report], run_name: str) -> list[Report]:
    """The attempts of one run, oldest first; "a-1-0" is no attempt of the run "a"."""
    own = [report for report in reports if re.fullmatch(rf"{re.escape(run_name)}-\d+", report.id)]
    return sorted(own, key=lambda report: report.attempt)


class Target(Protocol):
    """A place where jobs run. Every method raises ValueError with what to do when the place is the reason."""

    settings: Any

    def render(self, job: Job) -> str:
        """What would be sent; the same for the same job, with secrets as references only."""
        ...

    def lint(self, job: Job) -> list[str]:
        """What is wrong with the job, found without asking the target."""
        ...

    def preflight(self, job: Job) -> list[str]:
        """What the target itself would refuse, found by asking it, before anything is created."""
        ...

    def submit(self, job: Job) -> None:
        """Creates the job; when that fails half-way, takes back what was made."""
        ...

    def reports(self, run: Run) -> list[Report]:
        """What the target knows of the run's attempts."""
        ...

    def logs(self, run: Run, id: str, *, follow: bool) -> Iterator[str]:
        """Pieces of the log from its beginning; may end early, then it is asked again."""
        ...

    def stop(self, run: Run, id: str) -> None:
        """Asks the job to checkpoint and end; after the grace it is ended. Returns when it is over."""
        ...


@runtime_checkable
class Scales(Protocol):
    """A target that knows which devices a run's engines can have."""

    def scale(self, run: Run, id: str, engines: int) -> str:
        """Asks the attempt for so many; what was done."""
        ...


class TargetSettings(Settings):
    """What every target has."""

    stop_grace_s: int = 120
    """How long a stopped job may take to finish its step and write its checkpoint."""
    start_deadline_s: int = 900
    """Longest wait for each phase of the start; the message says which phase and what to look at."""
    secrets: dict[str, str] = Field(default_factory=dict)
    """Environment variable -> file on the target that holds its value, e.g. {WANDB_API_KEY:
    /etc/keys/wandb}."""
