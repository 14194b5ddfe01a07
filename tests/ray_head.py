"""A real Ray head of our own for tests: token on, ports of its own, nothing shared with other Rays of the
host."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(folder: Path) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return {
        **keep, "HOME": str(home), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip


def contents(*folders: Path) -> dict[Path, bytes]:
    """Of every plain file below. A Ray at work replaces and removes files while they are read; those are left
    out."""
    found = {}
    for file in (Path(base, name) for top in folders for base, _, names in os.walk(top) for name in names):
        with suppress(FileNotFoundError):
            if S_ISREG(file.stat().st_mode):
                found[file] = file.read_bytes()
    return found


def start_head(folder: Path, temp: Path, cpus: int = 2) -> SimpleNamespace:
    """``temp`` is short: Ray's sockets live under it. Kill with ``stop_head``."""
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    port, dashboard = free_port(), free_port()
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}",
             f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
             "--node-ip-address=127.0.0.1", "--object-store-memory=100000000", f"--temp-dir={temp}",
             f"--dashboard-agent-listen-port={free_port()}"],
            env=environment(folder), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    token = (folder / "token").read_text()
    for _ in range(120):
        try:
            request = urllib.request.Request(
                f"{address}/api/v0/nodes?detail=1", headers={"Authorization": f"Bearer {token}"}
            )
            if b"ALIVE" in urllib.request.urlopen(request, timeout=5).read():
                break
        except OSError:
            assert process.poll() is None, (folder / "head.log").read_text()
        time.sleep(0.5)
    else:
        raise AssertionError((folder / "head.log").read_text())
    return SimpleNamespace(
        address=address,
        gcs=f"127.0.0.1:{port}",
        token=token,
        token_file=folder / "token",
        process=process,
        temp=temp,
    )


def stop_head(head: SimpleNamespace) -> None:
    os.killpg(head.process.pid, signal.SIGTERM)
    try:
        head.process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(head.process.pid, signal.SIGKILL)
