"""A small run whose processes are killed from outside, and what must hold afterwards.

Victims come from ``roster.json``, never from process titles. Two invariants after every fault: the uids that
were trained are those that were planned, each once; and nothing is left: no process, no file outside the run
directory, no socket of an engine that is gone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from actors.engine_sockets import dead_folders
from orchestrator.ledger import Ledger
from tests.fakes import prompt
from tests.models import tiny_model

ROOT = Path(__file__).parents[2]
NUM_PROMPTS, PER_STEP, SAMPLES = 40, 4, 2
# Of a driver that was killed they first try to tell a GCS that is gone.
AGENTS, AGENTS_END_S = ("ray::DashboardAgent", "ray::RuntimeEnvAgent"), 90.0
RUN = """
run_dir: {folder}/run
seed: 3
model: {{path: {folder}/model, dtype: float32, max_length: 256}}
roles:
  reward: {{function: "tests.fakes:length", cpus_per_worker: 0.2}}
  actor: {{cpus_per_worker: 0.2}}
  critic: {{cpus_per_worker: 0.2}}
  reference: {{cpus_per_worker: 0.2}}
engine: {{cpus_per_worker: 0.2, kv_cache_mb: 32}}
deadlines: {{silence_s: 8, stall_s: 15}}
recovery: {{restarts: 100}}
rl:
  prompts: {{path: {folder}/prompts.jsonl}}
  steps: 3
  prompts_per_step: 4
  samples_per_prompt: 2
  sampling: {{max_new_tokens: 200}}
  updates: {{minibatches: 2}}
  save_every: 1
  samples_every: 1
  algorithm: {{name: grpo, kl_coef: 0.0}}
"""


class Rig:
    """One run directory, and the process that trains in it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.run, self.overrides = folder, folder / "run", overrides
        folder.mkdir(parents=True, exist_ok=True)
        tiny_model(folder / "model", tied=False)
        lines = [json.dumps({"prompt": f"{row} and "}) for row in range(NUM_PROMPTS)]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "run.yaml").write_text(RUN.format(folder=folder))
        self.outside = self._outside()
        self.process: subprocess.Popen | None = None
        self.within: tuple[str, ...] = ()  # a command that starts the run's command
        self.seen: set[psutil.Process] = set()  # equal when pid and start are

    def start(self, *options: str) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "launch.cli", "train", str(self.folder / "run.yaml")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.within, *command, *self.overrides, *options],
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def wait(self, timeout_s: float = 240) -> int:
        assert self.process is not None
        ends = time.monotonic() + timeout_s
        while (code := self.process.poll()) is None:
            self.look()
            assert time.monotonic() < ends, self.log()
            time.sleep(0.5)
        return code

    def look(self) -> None:
        """Notes every process below the driver: Ray's, the workers, vLLM's."""
        if self.process is None:
            return
        with suppress(psutil.NoSuchProcess):
            self.seen.update(psutil.Process(self.process.pid).children(recursive=True))

    def finish(self, *options: str) -> None:
        """Starts and waits for the regular end."""
        self.start(*options)
        assert self.wait() == 0, self.log()

    def log(self) -> str:
        error = self.run / "error.log"
        return (self.folder / "log").read_text()[-4000:] + (error.read_text() if error.exists() else "")

    # what the run says of itself

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Whole ones: the last may be under way."""
        path = self.run / name
        texts = path.read_text().splitlines() if path.exists() else []
        return [json.loads(text) for text in texts if text.endswith("}")]

    def steps(self) -> list[dict[str, Any]]:
        """The metrics of each step, those of the last time where it was done again."""
        rows = {line["step"]: line for line in self.lines("metrics.jsonl") if "actor/loss" in line}
        return [rows[step] for step in sorted(rows)]

    def responses(self) -> dict[str, str]:
        return {line["uid"]: line["response"] for line in self.lines("samples.jsonl")}

    def incidents(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines("incidents.jsonl") if line["kind"] == kind]

    def roster(self) -> list[dict[str, Any]]:
        path = self.run / "roster.json"
        return json.loads(path.read_text()) if path.exists() else []

    # doing

    def until(self, what: Callable[[], Any], timeout_s: float = 240) -> Any:
        """Its value, as soon as it is one."""
        ends = time.monotonic() + timeout_s
        while not (found := what()):
            assert time.monotonic() < ends, self.log()
            assert self.process is not None and self.process.poll() is None, self.log()
            time.sleep(0.01)
        self.look()
        return found

    def until_step(self, step: int) -> None:
        self.until(lambda: len(self.steps()) >= step)

    def pid(self, role: str, rank: int = 0) -> int:
        found = [line["pid"] for line in self.roster() if (line["role"], line["rank"]) == (role, rank)]
        assert found, self.roster()
        return found[0]

    def strike(self, role: str, rank: int = 0, number: int = signal.SIGKILL) -> tuple[int, float]:
        """The victim's pid and the moment, on the clock of incidents.jsonl."""
        pid, moment = self.pid(role, rank), time.monotonic()
        os.kill(pid, number)
        return pid, moment

    # invariants

    def check(self) -> None:
        self.check_ledger()
        assert len(self.seen) > len(self.roster())  # there was something to see
        self.check_hygiene(AGENTS_END_S)
        assert dead_folders() == []  # a killed driver's go when the run is resumed

    def check_ledger(self) -> None:
        order = Ledger([prompt(row) for row in range(NUM_PROMPTS)], seed=3).prompts()
        trained = [uid for line in self.lines("rl/trained.jsonl") for uid in line["uids"]]
        assert trained == [next(order).uid for _ in trained]
        assert len(trained) == PER_STEP * len(self.steps())

    def check_hygiene(self, within_s: float, *, agents: bool = True) -> None:
        """``agents``: Ray's too."""
        ends = time.monotonic() + within_s
        while left := [name for name in self.left_over() if agents or not name.endswith(AGENTS)]:
            assert time.monotonic() < ends, left
            time.sleep(0.2)
        assert self._outside() == self.outside

    def left_over(self) -> list[str]:
        """Processes that worked for this run and still do."""
        found = []
        for process in self.seen:
            with suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {process.name()}")
        return found

    def _outside(self) -> set[str]:
        names = {"run", "log"}
        return {
            str(path)
            for path in self.folder.rglob("*")
            if path.relative_to(self.folder).parts[0] not in names
        }


@contextmanager
def rig(folder: Path, *overrides: str) -> Iterator[Rig]:
    """Ends what the run has left, should the test fail."""
    made = Rig(folder, *overrides)
    try:
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.process.kill()
        made.look()
        for line in made.roster():
            if psutil.pid_exists(line["pid"]) and line["role"] != "driver":
                psutil.Process(line["pid"]).kill()
