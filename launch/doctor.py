"""``quartet doctor``: what a run needs of this machine, each line with what to do when it is not there.

    ok    shared memory      /dev/shm has 12.0 GiB free
    FAIL  Ray refuses        http://... answers without a token; set RAY_AUTH_MODE=token

A check is a function that returns its finding or raises ``Trouble``. The exit status is 1 with any FAIL.
"""

from __future__ import annotations

import argparse
import ctypes
import email.utils
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

TESTED = {"ray": "2.60.0", "deepspeed": "0.19.8", "transformers": "5.19.0", "torch": "2.13.0"}
MIN_SHM_GB, MIN_DISK_MB_S, MAX_SKEW_S = 1.0, 50.0, 5.0
DISK_MB = 64
TIMEOUT_S = 5


class Trouble(Exception):
    """What is wrong, and what to do."""


class Skipped(Exception):
    """Why a check does not apply here."""


def versions() -> str:
    wrong = [
        f"{name} {metadata.version(name)} (tested: {tested})"
        for name, tested in TESTED.items()
        if metadata.version(name).split("+")[0] != tested
    ]
    if wrong:
        raise Trouble(f"{', '.join(wrong)}; run `make setup`")
    return f"Python {sys.version.split()[0]}, " + ", ".join(f"{n} {v}" for n, v in TESTED.items())


def drivers() -> str:
    if shutil.which("nvidia-smi") is None:
        raise Skipped("no NVIDIA driver: roles run on CPUs")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise Trouble(f"nvidia-smi: {done.stdout.strip() or done.stderr.strip()}; repair the driver")
    rows = done.stdout.strip().splitlines()
    return f"{len(rows)} GPUs: {rows[0]}"


def libraries() -> str:
    """What no wheel brings."""
    if shutil.which("nvidia-smi") is not None:
        raise Skipped("only vLLM's CPU kernels need libnuma")
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        raise Trouble(
            "vLLM's CPU kernels need libnuma.so.1; install it (Debian: libnuma1, Fedora: numactl-libs)"
        ) from None
    return "libnuma.so.1 is there"


def collective(backend: str) -> str:
    """Two processes (one per GPU for NCCL) add 1 and 2."""
    import torch  # noqa: PLC0415

    gpus = torch.cuda.device_count()
    if backend == "nccl" and gpus < 2:
        raise Skipped(f"{gpus} GPUs on this machine, NCCL needs two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "import sys, torch, torch.distributed as d; r, b = int(sys.argv[1]), sys.argv[2];"
        f"d.init_process_group(b, init_method='tcp://127.0.0.1:{port}', rank=r, world_size=2);"
        "x = torch.tensor([r + 1.0], device=f'cuda:{r}' if b == 'nccl' else 'cpu'); d.all_reduce(x);"
        "assert x.item() == 3.0; d.destroy_process_group()"
    )
    began = time.monotonic()
    pair = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), backend], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=90)[1] for process in pair]
    except subprocess.TimeoutExpired:
        raise Trouble(
            f"{backend}: no answer in 90 s; name the interface in {backend.upper()}_SOCKET_IFNAME"
        ) from None
    finally:
        for process in pair:
            process.kill()
    if any(process.returncode for process in pair):
        raise Trouble(f"{backend}: {' '.join(said)[-300:].strip()}; see {backend.upper()}_SOCKET_IFNAME")
    return f"two processes agreed within {time.monotonic() - began:.1f} s"


def shared_memory() -> str:
    free = shutil.disk_usage("/dev/shm").free / 2**30
    if free < MIN_SHM_GB:
        raise Trouble(
            f"/dev/shm has {free:.2f} GiB free, Ray keeps its objects there; docker: --shm-size=8g, "
            "Kubernetes: shm_gi"
        )
    return f"/dev/shm has {free:.1f} GiB free"


def disk(folder: Path) -> str:
    """Writes and syncs a file where checkpoints would go."""
    folder.mkdir(parents=True, exist_ok=True)
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        began = time.monotonic()
        for _ in range(DISK_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = DISK_MB / (time.monotonic() - began)
    if speed < MIN_DISK_MB_S:
        raise Trouble(
            f"{folder} writes {speed:.0f} MB/s; checkpoints will wait for it: set run_dir elsewhere"
        )
    return f"{folder} writes {speed:.0f} MB/s"


def get(url: str, token: str | None = None) -> tuple[int, str, str]:
    """(HTTP status, body, the server's Date)."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode(), answer.headers.get("Date", "")
    except urllib.error.HTTPError as error:
        return error.code, "", error.headers.get("Date", "")
    except OSError as error:
        raise Trouble(
            f"{url} cannot be reached ({getattr(error, 'reason', error)}); address, proxy or firewall"
        ) from None


def ray_refuses(address: str | None) -> str:
    if not address:
        raise Skipped("give --ray http://HEAD:8265 to check a cluster")
    status, _, _ = get(f"{address}/api/jobs/")
    if status not in (401, 403):
        raise Trouble(
            f"{address} answers HTTP {status} without a token: whoever reaches it runs code there; start it "
            "with RAY_AUTH_MODE=token"
        )
    return f"an unauthenticated request is refused (HTTP {status})"


def ray_answers(address: str | None) -> str:
    if not address:
        raise Skipped("give --ray http://HEAD:8265 to check a cluster")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = os.environ.get("RAY_AUTH_TOKEN") or (Path(path).read_text().strip() if path else None)
    status, body, _ = get(f"{address}/api/version", token)
    if status != 200:
        raise Trouble(f"{address} answers HTTP {status}; set RAY_AUTH_TOKEN_PATH to the cluster's token")
    theirs = json.loads(body)["ray_version"]
    if theirs != TESTED["ray"]:
        raise Trouble(f"{address} runs Ray {theirs}, this is {TESTED['ray']}; install the same on both sides")
    return f"Ray {theirs} at {address}"


def hub() -> str:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise Skipped("HF_HUB_OFFLINE=1: models come from folders")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    token = os.environ.get("HF_TOKEN")
    status, _, _ = get(f"{endpoint}/api/{'whoami-v2' if token else 'models?limit=1'}", token)
    if status != 200:
        raise Trouble(f"{endpoint} answers HTTP {status}; renew HF_TOKEN, or set HF_HUB_OFFLINE=1")
    return f"{endpoint} answers{' to HF_TOKEN' if token else ''}"


def clock(address: str | None) -> str:
    """Against the Date of the cluster, or of the Hub: to one second, which is what the header holds."""
    url = f"{address}/api/version" if address else os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not address and os.environ.get("HF_HUB_OFFLINE") == "1":
        raise Skipped("no other clock: give --ray")
    _, _, date = get(url)
    if not date:
        raise Skipped(f"{url} sends no date")
    now = email.utils.parsedate_to_datetime(email.utils.formatdate(usegmt=True))
    skew = abs((now - email.utils.parsedate_to_datetime(date)).total_seconds())
    if skew > MAX_SKEW_S:
        raise Trouble(f"this clock and that of {url} differ by {skew:.0f} s; start NTP (chrony) on both")
    return f"within {max(skew, 1):.0f} s of {url}"


def examine(checks: Sequence[tuple[str, Callable[[], str]]]) -> int:
    failed = 0
    for name, check in checks:
        try:
            mark, finding = "ok", check()
        except Skipped as why:
            mark, finding = "skip", str(why)
        except Trouble as trouble:
            mark, finding, failed = "FAIL", str(trouble), 1
        sys.stdout.write(f"{mark:<5} {name:<15} {finding}\n")
        sys.stdout.flush()
    return failed


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="quartet doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ray", metavar="URL", help="dashboard of a Ray cluster, e.g. http://127.0.0.1:8265")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where checkpoints would go")
    arguments = parser.parse_args(argv)
    address = arguments.ray.rstrip("/") if arguments.ray else None
    return examine(
        [
            ("versions", versions),
            ("drivers", drivers),
            ("libraries", libraries),
            ("gloo", lambda: collective("gloo")),
            ("NCCL", lambda: collective("nccl")),
            ("shared memory", shared_memory),
            ("disk", lambda: disk(arguments.run_dir)),
            ("Ray", lambda: ray_answers(address)),
            ("Ray refuses", lambda: ray_refuses(address)),
            ("Hub", hub),
            ("clock", lambda: clock(address)),
        ]
    )
