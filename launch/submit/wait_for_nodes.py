"""``python -m launch.submit.wait_for_nodes ADDRESS COUNT SECONDS``: returns when so many Ray nodes are
alive."""

import sys
import time

import ray

POLL_S = 0.3


def main() -> int:
    address, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    ray.init(address=address, log_to_driver=False, logging_level="error")
    deadline = time.monotonic() + seconds
    while True:
        alive = sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])
        if len(alive) >= count:
            return 0
        if time.monotonic() > deadline:
            sys.stderr.write(
                f"{len(alive)} of {count} nodes joined within {seconds:g} s: {', '.join(alive)}\n"
            )
            return 1
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
