"""Who may write into a run directory, and how fast a second run and a second signal are answered."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch import run_folder
from launch.run_folder import RunFolder
from tests.ray_head import ROOT
from tests.test_config import RL, load


def run_in(folder):
    return load(*RL, f"run_dir={folder}")


def census(folder):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("flag", ["--resume", "--fresh", None])
def test_a_second_run_on_a_directory_is_refused_within_two_seconds_and_changes_nothing(tmp_path, flag):
    """FAULTS 26. The second is a process of its own, with its imports."""
    (tmp_path / "run.yaml").write_text(
        "model: {path: x}\nrl: {steps: 3}\nroles: {reward: {function: exact_match}}"
    )
    command = [sys.executable, "-m", "launch.cli", "train", str(tmp_path / "run.yaml")]
    command += [f"run_dir={tmp_path / 'run'}", *([flag] if flag else [])]
    with RunFolder(run_in(tmp_path / "run"), resume=False, fresh=False) as folder:
        (folder.path / "metrics.jsonl").write_text("")
        before, began = census(folder.path), time.monotonic()
        used = os.times()
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        spent = os.times()
        assert second.returncode == 2, second.stderr
        assert f"in use by another run (pid {os.getpid()} on {os.uname().nodename})" in second.stderr
        assert census(folder.path) == before
        busy = spent.children_user + spent.children_system - used.children_user - used.children_system
        assert min(busy, time.monotonic() - began) < 2  # its own time: other processes share this machine


def test_a_directory_is_free_again_when_its_run_is_over_and_an_error_holds_none(tmp_path):
    run = run_in(tmp_path / "run")
    with RunFolder(run, resume=False, fresh=False) as folder:
        (folder.path / "metrics.jsonl").write_text("")
    for _ in range(2):
        with pytest.raises(ValueError, match="already holds a run; go on with --resume"):
            RunFolder(run, resume=False, fresh=False).__enter__()
    with RunFolder(run, resume=True, fresh=False) as folder:
        assert (folder.path / "metrics.jsonl").exists()
    with RunFolder(run, resume=False, fresh=True) as folder:
        assert not (folder.path / "metrics.jsonl").exists()


def test_a_directory_that_cannot_be_written_or_is_full_is_refused_before_anything_starts(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder for this user; choose another run_dir"):
        RunFolder(run_in(tmp_path / "file" / "run"), resume=False, fresh=False).__enter__()
    monkeypatch.setattr(run_folder, "LEAST_FREE_BYTES", 2**80)
    with pytest.raises(ValueError, match="MiB left on its disk; make room"):
        RunFolder(run_in(tmp_path / "run"), resume=False, fresh=False).__enter__()
    assert not (tmp_path / "run").exists()


def test_the_second_sigterm_ends_the_process_at_once():
    program = (
        "import asyncio, sys, time\n"
        "from launch.graceful import StopRequest, stop_on_sigterm\n"
        "async def main():\n"
        "    stop = StopRequest()\n"
        "    with stop_on_sigterm(stop):\n"
        "        print('ready', flush=True)\n"
        "        while not stop.asked: await asyncio.sleep(0.01)\n"
        "        print('asked', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for word in ("ready", "asked"):
        assert process.stdout.readline() == f"{word}\n"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert time.monotonic() - began < 1
