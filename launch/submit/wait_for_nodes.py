"""``python -m launch.submit.wait_for_nodes ADDRESS COUNT SECONDS FOLDER [PID ...]``: returns when so many Ray
nodes are alive.

The processes PID keep the nodes (the head, Slurm's step of the workers). When one of them ends, or one worker
of the step says so by a file FOLDER/NAME.ended with its exit code, the nodes that are missing will never
come, and waiting ends at once.
"""

import sys
import time
from pathlib import Path

import psutil
import ray

POLL_S = 0.3


def main() -> int:
    address, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    folder, keepers = Path(sys.argv[4]), [int(pid) for pid in sys.argv[5:]]
    ray.init(address=address, log_to_driver=False, logging_level="error")
    deadline = time.monotonic() + seconds
    while True:
        alive = sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])
        if len(alive) >= count:
            return 0
        why = f"within {seconds:g} s" if time.monotonic() > deadline else None
        if ended := [pid for pid in keepers if has_ended(pid)]:
            why = f"and process {ended[0]}, which starts them, has ended"
        for worker in sorted(folder.glob("*.ended")):
            why = f"and {worker.stem} has ended with code {worker.read_text().strip()}"
        if why:
            sys.stderr.write(f"{len(alive)} of {count} nodes joined {why}: {', '.join(alive)}\n")
            return 1
        time.sleep(POLL_S)


def has_ended(pid: int) -> bool:
    """Also while its parent has not asked for its exit code yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


if __name__ == "__main__":
    sys.exit(main())
