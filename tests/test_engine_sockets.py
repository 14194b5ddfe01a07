"""The folder of an engine's sockets: nobody removes it while it lives; when it was killed the next does."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from actors.engine_sockets import dead_folders, remove_dead_folders, remove_own_folder, socket_folder

ROOT = Path(__file__).parents[1]
ENGINE = """
import sys
from actors.engine_sockets import socket_folder
print(socket_folder()["VLLM_RPC_BASE_PATH"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary(monkeypatch):
    """A short path, which that of ``tmp_path`` is not."""
    with tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def start(temporary: Path) -> tuple[subprocess.Popen, Path]:
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert engine.stdout is not None
    return engine, Path(engine.stdout.readline().strip())


def test_the_folder_of_a_killed_engine_goes_and_those_of_others_stay(temporary):
    (temporary / "quartet-mine").mkdir()  # of somebody who knows nothing of engines
    (killed, left), (living, kept) = start(temporary), start(temporary)
    assert left.parent == kept.parent == temporary
    (left / "socket").touch()
    assert dead_folders() == []
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert dead_folders() == [left]
    remove_dead_folders()
    assert {path.name for path in temporary.iterdir()} == {kept.name, "quartet-mine"}
    living.kill()
    living.wait()
    successor, new = start(temporary)
    assert {path.name for path in temporary.iterdir()} == {new.name, "quartet-mine"}
    successor.kill()
    successor.wait()


def test_an_engine_that_ends_takes_its_folder_along(temporary):
    folder = Path(socket_folder()["VLLM_RPC_BASE_PATH"])
    assert folder.is_dir()
    remove_own_folder()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("length", "made"), [(53, 1), (54, 0)])
def test_a_long_path_is_left_to_vllm(temporary, length, made, monkeypatch):
    """A socket's path has at most 107 bytes, of which vLLM's names take 37 with their slash, ours 17."""
    long = temporary / ("x" * (length - len(str(temporary)) - 1))
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert len(socket_folder()) == made
    assert len(list(long.iterdir())) == made
    remove_own_folder()
