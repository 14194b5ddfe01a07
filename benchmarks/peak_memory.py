"""Peak memory of a command and every process it starts, Ray's daemons included.

    python benchmarks/peak_memory.py -- quartet train quickstart --fresh

A process belongs to the command when it inherited a marker in its environment; shared pages are split among
those that map them (PSS), so the sum is what the machine has less of. Prints one JSON line at the end: the
peak in GiB, when it was, and the largest processes at that moment. Linux only.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

MARKER = "QUARTET_PEAK_MEMORY"
EVERY_S = 0.5


def members(marker: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if marker in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def memory(pid: int) -> tuple[int, str]:
    """Bytes (PSS) and name; 0 for a process that ended meanwhile."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return 0, ""
    kib = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return kib * 1024, Path(name).name


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] != "--":
        sys.exit(__doc__)
    marker = f"{MARKER}={uuid.uuid4().hex}"
    start = time.monotonic()
    name, value = marker.split("=")
    process = subprocess.Popen(sys.argv[2:], env=os.environ | {name: value})
    peak, at_s, largest = 0, 0.0, []
    while process.poll() is None:
        sizes = sorted((memory(pid) for pid in members(marker.encode())), reverse=True)
        total = sum(size for size, _ in sizes)
        if total > peak:
            peak, at_s, largest = total, time.monotonic() - start, sizes[:12]
        time.sleep(EVERY_S)
    report = {
        "peak_gib": round(peak / 2**30, 2),
        "at_s": round(at_s),
        "wall_s": round(time.monotonic() - start),
        "largest_gib": [[name, round(size / 2**30, 2)] for size, name in largest],
    }
    print(json.dumps(report))
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
