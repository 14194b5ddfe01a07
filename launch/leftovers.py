"""Processes of an earlier start of the same run: a driver that was killed cannot end its workers."""

import json
import socket
from pathlib import Path

import psutil

GONE_S = 10.0


def end_leftovers(roster: Path) -> list[int]:
    """Kills what the roster names on this machine and still runs; returns its pids. Call it while holding the
    run directory: the driver of the roster is then gone. A pid that another process has by now began after
    the roster was written, and is left alone."""
    if not roster.exists():
        return []
    written = roster.stat().st_mtime
    left = []
    for line in json.loads(roster.read_text()):
        if line["node"] != socket.gethostname() or line["role"] == "driver":
            continue
        try:
            process = psutil.Process(line["pid"])
            if process.create_time() <= written and _is_ours(process):
                process.kill()
                left.append(process)
        except psutil.Error:
            continue
    psutil.wait_procs(left, timeout=GONE_S)
    return [process.pid for process in left]


def _is_ours(process: psutil.Process) -> bool:
    """By its title, beside the pid: a worker of Ray, or one of vLLM's processes."""
    title = " ".join(process.cmdline()).lower()
    return "ray::" in title or "vllm" in title or "multiprocessing" in title
