"""The file is complete whatever the services do; the services that work get everything."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch.sidecar import Record, SideCar
from launch.tracking import TensorBoardSink, Tracker, open_tracker, read_metrics
from launch.wandb_sink import WandbSink
from orchestrator.configfile import load_run


class FakeSink:
    """Keeps what it is given; hangs or raises at the verb it is told."""

    def __init__(self, *, hang="", fail=""):
        self.hang, self.fail = hang, fail
        self.steps, self.abandoned, self.released = [], 0, threading.Event()

    def _at(self, verb):
        if verb == self.hang:
            self.released.wait(30)
        if verb == self.fail:
            raise ConnectionError("the service is away")

    def open(self):
        self._at("open")

    def log(self, record):
        self._at("log")
        self.steps.append(record.step)

    def close(self):
        self._at("close")

    def abandon(self):
        self.abandoned += 1
        self.released.set()


def logged(tmp_path, sink, *, steps=20, capacity=1000):
    """Logs some steps and closes; gives the slowest log call, the time to close, and the side-car."""
    side_car = SideCar("fake", sink, capacity=capacity)
    tracker = Tracker(tmp_path / "metrics.jsonl", [side_car])
    slowest = 0.0
    for step in range(steps):
        start = time.perf_counter()
        tracker.log("rl", step, {"reward": step / 2})
        slowest = max(slowest, time.perf_counter() - start)
    start = time.perf_counter()
    tracker.close(timeout_s=0.2)
    assert [(m["step"], m["reward"]) for m in read_metrics(tmp_path / "metrics.jsonl")] == [
        (step, step / 2) for step in range(steps)
    ]
    return slowest, time.perf_counter() - start, side_car


def test_a_working_service_gets_every_step(tmp_path):
    sink = FakeSink()
    _, _, side_car = logged(tmp_path, sink)
    assert (sink.steps, side_car.missed, sink.abandoned) == (list(range(20)), 0, 0)


@pytest.mark.parametrize("verb", ["open", "log", "close"])
def test_a_service_that_hangs_does_not_hold_the_run(tmp_path, caplog, verb):
    sink = FakeSink(hang=verb)
    slowest, closing, _ = logged(tmp_path, sink)
    assert slowest < 0.1
    assert closing < 1.0
    assert sink.abandoned == 1
    assert "fake did not finish in time" in caplog.text


@pytest.mark.parametrize("verb", ["open", "log", "close"])
def test_a_service_that_raises_is_switched_off_with_one_warning(tmp_path, caplog, verb):
    sink = FakeSink(fail=verb)
    _, _, side_car = logged(tmp_path, sink)
    assert caplog.text.count("ConnectionError: the service is away") == 1
    assert side_car.missed == (0 if verb == "close" else 20)


def test_what_the_queue_cannot_hold_is_dropped_and_counted(tmp_path, caplog):
    sink = FakeSink(hang="open")
    _, _, side_car = logged(tmp_path, sink, capacity=5)
    assert side_car.missed == 20
    assert side_car._queue.qsize() <= 6  # five records and the end mark
    assert "fake missed 20 records" in caplog.text


def test_a_value_that_is_not_finite_is_null_in_the_file(tmp_path):
    tracker = Tracker(tmp_path / "metrics.jsonl")
    tracker.log("sft", 1, {"loss": float("nan"), "kl": float("inf"), "n": 2})
    tracker.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert {k: line[k] for k in ("stage", "step", "loss", "kl", "n")} == {
        "stage": "sft", "step": 1, "loss": None, "kl": None, "n": 2.0
    }  # fmt: skip
    assert Record(stage="sft", step=1, values={"loss": None, "n": 2.0}).finite() == {"sft/n": 2.0}


def test_a_resumed_run_cuts_the_torn_line_and_the_later_of_two_equal_steps_counts(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"stage": "rl", "step": 1, "x": 1}\n{"stage": "rl", "step": 2, "x": 1}\n{"stage": "r')
    tracker = Tracker(file)
    tracker.log("rl", 2, {"x": 5})
    tracker.close()
    assert [(m["step"], m["x"]) for m in read_metrics(file)] == [(1, 1), (2, 5.0)]


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path / "metrics.jsonl", [SideCar("tensorboard", TensorBoardSink(tmp_path / "tb"))])
    tracker.log("rl", 1, {"reward": 0.25, "kl": float("nan")})
    tracker.log("rl", 2, {"reward": 0.5})
    tracker.close(timeout_s=60)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["scalars"] == ["rl/reward"]
    assert [(e.step, e.value) for e in events.Scalars("rl/reward")] == [(1, 0.25), (2, 0.5)]


def wandb_run(folder, mode):
    return load_run(
        [], ["model.path=x", "sft={}", f"run_dir={folder / 'run'}", f"tracking.wandb={mode}", "name=trial"]
    )


@pytest.mark.slow
def test_wandb_offline_writes_under_the_run_directory_only(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    tracker = open_tracker(wandb_run(tmp_path, "offline"))
    tracker.log("rl", 1, {"reward": 0.25})
    tracker.close(timeout_s=60)
    (events,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"rl/reward" in events.read_bytes()
    assert [*(tmp_path / "home").rglob("*"), *(tmp_path / "tmp").rglob("*")] == []


@pytest.mark.slow
def test_a_wandb_server_that_never_answers_does_not_hold_the_process(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {
            **os.environ,
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": "a" * 40,
        }
        script = (
            "import sys, pathlib, time; from launch.tracking import open_tracker\n"
            "from tests.test_tracking import wandb_run\n"
            "tracker = open_tracker(wandb_run(pathlib.Path(sys.argv[1]), 'online'))\n"
            "tracker.log('rl', 1, {'reward': 1.0}); time.sleep(4); tracker.close(timeout_s=1)\n"
        )
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0
    assert "wandb did not finish in time and is abandoned" in done.stderr
    assert time.monotonic() - start < 15
    assert [m["reward"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1.0]
    assert processes_naming(str(tmp_path)) == []


def processes_naming(text):
    """Processes that live in the folder of a test: none may survive it."""
    import psutil

    found = []
    for process in psutil.process_iter(["environ", "cmdline"]):
        environment = process.info["environ"] or {}
        if process.pid != os.getpid() and text in environment.get("WANDB_CACHE_DIR", ""):
            found.append(process.info["cmdline"])
    return found


def test_a_run_has_one_wandb_id_also_after_a_resume(tmp_path):
    from launch.wandb_sink import _run_id

    first = _run_id(tmp_path / "run_id")
    assert _run_id(tmp_path / "run_id") == first
    assert len(first) == 12


def test_abandoning_a_sink_that_never_opened_is_harmless(tmp_path):
    WandbSink(wandb_run(tmp_path, "offline")).abandon()
