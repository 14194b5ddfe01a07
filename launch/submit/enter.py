"""The first process of a submitted job: secrets from files into the environment, then ``quartet train``.

Values of secrets exist only here and in the children's environment: not on a command line, not in a runtime
environment, where Ray would show them in its dashboard.
"""

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path

from launch.cli import main as quartet

REFUSED = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch.submit.enter")
    parser.add_argument("config")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--secret", action="append", default=[], metavar="NAME=FILE")
    arguments = parser.parse_args()
    if complaint := wrong_ray() or read_secrets(arguments.secret):
        sys.stderr.write(f"quartet: error: {complaint}\n")
        return REFUSED
    os.environ["QUARTET_SUBMITTED"] = "1"
    return quartet(["train", arguments.config, *(["--resume"] if arguments.resume else [])])


def wrong_ray() -> str | None:
    """QUARTET_RAY_VERSION is what the submitter's cluster runs; another one here cannot join it."""
    wanted, here = os.environ.get("QUARTET_RAY_VERSION"), metadata.version("ray")
    if wanted and wanted != here:
        return f"this image has Ray {here}, the cluster was declared with {wanted}; change ray_version"
    return None


def read_secrets(pairs: list[str]) -> str | None:
    for pair in pairs:
        name, _, file = pair.partition("=")
        try:
            os.environ[name] = Path(file).read_text().strip()
        except OSError as error:
            return f"secret {name}: {file} cannot be read ({error.strerror}); put it on every node"
    return None


if __name__ == "__main__":
    sys.exit(main())
