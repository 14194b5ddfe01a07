"""``quartet scale RUN engine=4``: how many engines a run that is at work should have.

The number is a file in the run's folder. The run looks for it every second (``engine_count.py``); a resume
finds it there too. Nothing here imports ray or torch.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from launch.locks import lock_is_held
from orchestrator.config import Run
from orchestrator.configfile import load_run
from orchestrator.durable import replace_durably

FILE = "scale.json"  # {"engine": 4}


def wanted_engines(folder: Path) -> int | None:
    """None: nobody has asked for another number than the run's own."""
    try:
        return int(json.loads((folder / FILE).read_text())["engine"])
    except FileNotFoundError:
        return None


def main(folder: Path, changes: Sequence[str]) -> int:
    """ValueError for a run that is not at work, roles that cannot change now, and impossible numbers."""
    count = _count(changes)
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is no run_dir of a run; give its folder, or what it was started with")
    run = load_run([folder / "config.yaml"], [])
    _refuse_shared(run)
    if not lock_is_held(folder):  # of run_folder.py
        raise ValueError(
            f"no run is at work in {folder}; start it with engine.replicas={count}, or go on with --resume"
        )
    replace_durably(folder / FILE, json.dumps({"engine": count}))
    print(f"{folder} was asked for {count} engine(s); it says in its log when they serve or have left")  # noqa: T201 - the answer of the command
    return 0


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The run, and what should change: words like engine=4."""
    changes = [word for word in words if re.fullmatch(r"[a-z_]+=.*", word)]
    return [word for word in words if word not in changes], changes


def _count(changes: Sequence[str]) -> int:
    if len(changes) != 1:
        raise ValueError(f"{len(changes)} changes were given; give one: quartet scale RUN engine=4")
    role, _, number = changes[0].partition("=")
    if role in ("actor", "critic", "reward", "reference"):
        raise ValueError(
            f"{changes[0]}: only engines come and go while a run works; stop it, and go on from its "
            f"checkpoint with other workers: quartet train ... roles.{role}.workers={number} --resume"
        )
    if role != "engine":
        raise ValueError(f"{changes[0]}: unknown role {role!r}; the one that can change now is engine")
    if not re.fullmatch(r"\d+", number) or int(number) < 1:
        raise ValueError(f"{changes[0]}: {number!r} is no number of engines; give 1 or more")
    return int(number)


def _refuse_shared(run: Run) -> None:
    for group in run.placement.share:
        if "engine" in group:
            others = ", ".join(role for role in group if role != "engine")
            raise ValueError(
                f"placement.share: the engines live on the devices of {others}, of which there are no more; "
                "give them devices of their own to change their number while the run works"
            )
