"""The rl stage around losses: what is rebuilt, what is trained again, how it ends, what is left behind."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from actors.errors import WorkerLost
from launch.graceful import StoppedAfterCheckpoint
from launch.leftovers import end_leftovers
from launch.recovery import TrainedLog, through_losses
from orchestrator.incidents import RestartsSpent
from orchestrator.ledger import Settled
from tests.chaos.soak import quiet_gaps


class Crew:
    """Writes down who was rebuilt; ``spent``: there is no restart left."""

    def __init__(self, spent: bool = False):
        self.spent, self.rebuilt, self.incidents_seen = spent, [], []

    async def rebuild_trainers(self, *, all_of_them: bool) -> None:
        if self.spent:
            raise RestartsSpent("actor rank 0 has no restarts left")
        self.rebuilt.append(all_of_them)

    def incidents(self, incident) -> None:
        self.incidents_seen.append((incident.kind, incident.detail))


class Journal:
    newest: Path | None = None
    saved = 0

    async def save_now(self) -> None:
        self.saved += 1
        self.newest = Path("step-00000007")


def lives(*ends):
    """A ``go_on`` that ends in these ways, one after the other."""
    left = list(ends)

    async def go_on() -> None:
        if (end := left.pop(0)) is not None:
            raise end

    return go_on


async def test_a_lost_trainer_is_rebuilt_and_training_goes_on_from_the_checkpoint():
    crew, journal = Crew(), Journal()
    await through_losses(lives(WorkerLost("critic rank 0 died in update"), None), crew, journal)
    assert crew.rebuilt == [True]  # without a checkpoint, all trainers begin again
    journal.newest = Path("step-00000003")
    await through_losses(lives(WorkerLost("actor rank 1 died"), WorkerLost("again"), None), crew, journal)
    assert crew.rebuilt == [True, False, False]
    assert crew.incidents_seen[1] == ("rolled back", "to step-00000003: actor rank 1 died")


async def test_spent_restarts_end_the_stage_after_a_checkpoint():
    journal = Journal()
    with pytest.raises(StoppedAfterCheckpoint, match=r"engine 0 has no restarts left.*step-00000007"):
        await through_losses(lives(RestartsSpent("engine 0 has no restarts left")), Crew(), journal)
    assert journal.saved == 1
    journal = Journal()
    with pytest.raises(StoppedAfterCheckpoint, match="the last checkpoint is None"):
        await through_losses(lives(WorkerLost("actor died")), Crew(spent=True), journal)
    assert journal.saved == 0  # there is nobody who could


def test_a_step_that_is_done_again_is_in_the_log_once_and_a_torn_line_is_forgotten(tmp_path):
    log = TrainedLog(tmp_path / "rl" / "trained.jsonl")
    log.cut(0)
    history = [Settled(uid=f"0/{row}", step=1 + row // 2) for row in range(6)]
    for step in (1, 2, 3):
        log.add(step, history[: 2 * step])
    log.write()
    log.add(4, [Settled(uid="0/9", step=4)])  # no checkpoint has this step
    with (tmp_path / "rl" / "trained.jsonl").open("a") as file:
        file.write('{"step": 4, "ui')
    log.cut(2)
    log.add(3, history)
    log.write()
    lines = [json.loads(line) for line in (tmp_path / "rl" / "trained.jsonl").read_text().splitlines()]
    assert lines == [{"step": k, "uids": [f"0/{2 * k - 2}", f"0/{2 * k - 1}"]} for k in (1, 2, 3)]


def test_a_full_disk_leaves_the_log_as_it_was_and_the_next_write_has_all_of_it(tmp_path, monkeypatch):
    log = TrainedLog(tmp_path / "trained.jsonl")
    log.add(1, [Settled(uid="0/1", step=1)])
    log.write()
    log.add(2, [Settled(uid="0/2", step=2)])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            log.write()
    assert (tmp_path / "trained.jsonl").read_text() == '{"step": 1, "uids": ["0/1"]}\n'
    log.write()
    assert len((tmp_path / "trained.jsonl").read_text().splitlines()) == 2


def test_leftovers_of_a_killed_driver_are_ended_and_nobody_else(tmp_path):
    sleeper = "import time; time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", sleeper, "ray::Actor"])
    stranger = subprocess.Popen([sys.executable, "-c", sleeper])
    elsewhere = subprocess.Popen([sys.executable, "-c", sleeper, "ray::Actor"])
    here = socket.gethostname()
    lines = [
        {"role": "driver", "pid": os.getpid(), "node": here},
        {"role": "actor", "pid": worker.pid, "node": here},
        {"role": "critic", "pid": stranger.pid, "node": here},  # the pid is another process's by now
        {"role": "reward", "pid": elsewhere.pid, "node": "another"},
        {"role": "engine", "pid": 2**22 + 1, "node": here},  # long gone
    ]
    (tmp_path / "roster.json").write_text(json.dumps(lines))
    try:
        assert end_leftovers(tmp_path / "roster.json") == [worker.pid]
        assert not psutil.pid_exists(worker.pid)
        assert psutil.pid_exists(stranger.pid) and stranger.poll() is None and elsewhere.poll() is None
        assert end_leftovers(tmp_path / "nothing.json") == []
    finally:
        for process in (worker, stranger, elsewhere):
            process.kill()
            process.wait()


def test_the_soaks_pace_is_of_steps_that_no_fault_touches():
    """Ends at 1, 2, 4, 9, 10; dead from 3.5 to 8: the steps of 2 and 5 s do not count."""
    assert quiet_gaps([1.0, 2.0, 4.0, 9.0, 10.0], [(3.5, 8.0)]) == [1.0, 1.0]
    assert quiet_gaps([1.0, 2.0], []) == [1.0]
