"""A driver that dies is started again, with pauses and a budget; one that was refused or asked to stop stays
down."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import keep_going

# Appends its options to a file, then does what the file of its number says.
DRIVER = """
import os, signal, sys, time
folder = sys.argv[1]
open(folder + "/starts", "a").write(" ".join(sys.argv[2:]) + "\\n")
number = len(open(folder + "/starts").readlines())
todo = open(folder + "/todo").read().split()[number - 1]
if todo == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if todo == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(30)
sys.exit(int(todo))
"""


def supervise(folder: Path, todo: str, restarts: int, monkeypatch) -> tuple[int, list[str]]:
    monkeypatch.setattr(keep_going, "FIRST_PAUSE_S", 0.01)
    (folder / "todo").write_text(todo)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    command = [sys.executable, "-c", DRIVER, str(folder)]
    try:
        code = keep_going.supervise(command, ["--fresh"], ["--resume"], restarts=restarts)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, (folder / "starts").read_text().splitlines()


@pytest.mark.parametrize(
    ("todo", "restarts", "code", "starts"),
    [
        ("0", 3, 0, ["--fresh"]),
        ("kill 1 75 0", 3, 0, ["--fresh", "--resume", "--resume", "--resume"]),
        ("kill kill kill", 2, 137, ["--fresh", "--resume", "--resume"]),
        ("2", 3, 2, ["--fresh"]),  # the run is wrong: it would be refused again
    ],
)
def test_a_driver_is_started_again_as_often_as_allowed(tmp_path, monkeypatch, todo, restarts, code, starts):
    assert supervise(tmp_path, todo, restarts, monkeypatch) == (code, starts)


def test_a_run_that_was_asked_to_stop_stays_down(tmp_path):
    (tmp_path / "todo").write_text("wait 0")
    code = (
        "import sys; from launch.keep_going import supervise; "
        "sys.exit(supervise([sys.executable, '-c', sys.argv[1], sys.argv[2]], [], [], restarts=3))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, DRIVER, str(tmp_path)])
    while not (tmp_path / "starts").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert len((tmp_path / "starts").read_text().splitlines()) == 1
