"""``quartet scale RUN engine=4``: how many engines a run that is at work should have.

The number is a file in the run's folder. The run looks for it every second (``engine_count.py``); a resume
finds it there too, unless it brings another ``engine.replicas``, which is the later word. Nothing here
imports ray or torch.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.locks import lock_is_held
from orchestrator.config import Run
from orchestrator.configfile import load_run
from orchestrator.durable import replace_durably

FILE = "scale.json"  # {"engines": 4, "by": "quartet scale", "replicas": 2}: the run was started with 2
BY_COMMAND, BY_ITSELF = "quartet scale", "engine.autoscale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How many engines, and who wants them."""

    engines: int
    by: str


def ask(run: Run, folder: Path, wish: Wish) -> None:
    """In place of what was asked before."""
    plain = {"engines": wish.engines, "by": wish.by, "replicas": run.engine.replicas}
    replace_durably(folder / FILE, json.dumps(plain))


def asked(run: Run, folder: Path) -> Wish | None:
    """None: nobody has asked since the run was started with its ``engine.replicas``."""
    try:
        plain = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return None
    if plain["replicas"] != run.engine.replicas:
        return None
    bounds = run.engine.autoscale
    engines = plain["engines"] if bounds is None else min(max(plain["engines"], bounds.min), bounds.max)
    return Wish(engines=engines, by=plain["by"])


def forget_older(run: Run, folder: Path) -> None:
    """What was asked of a run that was started with another number of engines."""
    if asked(run, folder) is None:
        (folder / FILE).unlink(missing_ok=True)


def main(folder: Path, changes: Sequence[str]) -> int:
    """ValueError for a run that is not at work, roles that cannot change now, and impossible numbers."""
    engines = count(changes)
    run = scalable(folder, engines)
    if not lock_is_held(folder):  # of run_folder.py
        raise ValueError(
            f"no run is at work in {folder}; start it with engine.replicas={engines}, or go on with --resume"
        )
    ask(run, folder, Wish(engines=engines, by=BY_COMMAND))
    print(f"{folder} was asked for {engines} engine(s); it says in its log when they serve or have left")  # noqa: T201 - the answer of the command
    return 0


def scalable(folder: Path, engines: int) -> Run:
    """The run of a run_dir. ValueError where its engines cannot become so many."""
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is no run_dir of a run; give its folder, or what it was started with")
    run = load_run([folder / "config.yaml"], [])
    _refuse_shared(run)
    _refuse_outside(run, engines)
    return run


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The run with its overrides, and what should change: words like engine=4."""
    names = {word: word.partition("=")[0] for word in words if re.fullmatch(r"[a-z_]+=.*", word)}
    changes = [word for word, name in names.items() if name == "engine" or name not in Run.model_fields]
    return [word for word in words if word not in changes], changes


def count(changes: Sequence[str]) -> int:
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


def _refuse_outside(run: Run, engines: int) -> None:
    bounds = run.engine.autoscale
    if bounds is not None and not bounds.min <= engines <= bounds.max:
        raise ValueError(
            f"engine={engines}: the run moves the number itself, between engine.autoscale.min={bounds.min} "
            f"and max={bounds.max}; give one of these, or --resume with other bounds"
        )
