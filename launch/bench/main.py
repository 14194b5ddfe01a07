"""The command ``quartet bench``: runs suites, writes the result file, its table and its plots.

quartet bench driver sync scaling                      these suites; the others' figures stay in the file
quartet bench phases --model FOLDER --dtype bfloat16   generation, scoring, training and prefix reuse
quartet bench step --run quickstart                    the whole step, by layout
quartet bench compare before.json after.json           what changed by more than the noise
quartet bench table mine.json                          the table and the plots again
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.bench import driver, phases, result, scaling, step, sync
from launch.bench.result import Figure
from launch.charts import curves

Arguments = argparse.Namespace
SUITES: dict[str, Callable[[Arguments], list[Figure]]] = {
    "driver": lambda _: driver.measure(),
    "sync": lambda _: sync.measure(),
    "scaling": lambda _: scaling.measure(),
    "phases": lambda given: phases.measure(_workload(given)),
    "step": lambda given: step.measure(given.run, given.set),
}


FIXED: dict[str, Mapping[str, Any]] = {"driver": driver.SIZES, "sync": sync.SIZES, "scaling": scaling.SIZES}


def main(argv: Sequence[str]) -> int:
    """ValueError for anything but known suites or readable result files."""
    given = _parser().parse_args(argv)
    words: list[str] = given.words
    if words[0] == "compare":
        if len(words) != 3:
            raise ValueError("compare takes two result files: quartet bench compare before.json after.json")
        before, after = map(Path, words[1:])
        _say(result.changes_table(result.compare(result.read(before), result.read(after))))
        if others := result.other_conditions(before, after):
            _say("Not measured alike:\n" + "\n".join(f"- {other}" for other in others))
        return 0
    if words[0] == "table":
        for word in words[1:]:
            draw(Path(word))
        return 0
    if unknown := [word for word in words if word not in SUITES]:
        raise ValueError(f"unknown suite {unknown[0]!r}; known: {', '.join(SUITES)}, compare, table")
    if "phases" in words and given.model is None:
        raise ValueError("phases needs a model: --model FOLDER, a plain folder of Transformers")
    for word in words:
        machine = result.machine()
        figures = SUITES[word](given)
        result.write(given.out, word, figures, config=_sizes(given, word), machine=machine)
        _say(result.table(figures))
    draw(given.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quartet bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="SUITE", help=f"{', '.join(SUITES)}, compare, table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench_cpu.json"))
    phase = parser.add_argument_group("phases")
    phase.add_argument("--model", metavar="FOLDER")
    phase.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, default in (
        ("prompts", 16), ("samples", 4), ("prompt-tokens", 128), ("response-tokens", 128), ("rounds", 3),
        ("threads", 1), ("micro-batch-tokens", 4096),
    ):  # fmt: skip
        phase.add_argument(f"--{name}", type=int, default=default)
    whole = parser.add_argument_group("step")
    whole.add_argument("--run", nargs="+", default=["quickstart"], metavar="RUN", help="as train takes it")
    whole.add_argument("--set", nargs="*", default=[], metavar="a.b.c=value")
    return parser


def _workload(given: Arguments) -> phases.Workload:
    return phases.Workload(
        model=given.model,
        dtype=given.dtype,
        num_prompts=given.prompts,
        samples=given.samples,
        prompt_tokens=given.prompt_tokens,
        response_tokens=given.response_tokens,
        rounds=given.rounds,
        threads=given.threads,
        micro_batch_tokens=given.micro_batch_tokens,
    )


def _sizes(given: Arguments, suite: str) -> dict[str, Any]:
    """What a suite measures, for the file; of a model its name and not where it lies."""
    if suite == "phases":
        return asdict(_workload(given)) | {"model": Path(given.model).name}
    return {"run": given.run, "set": given.set} if suite == "step" else dict(FIXED[suite])


def draw(path: Path) -> None:
    """``path`` as .md, and its curves as .svg files beside it."""
    figures = result.read(path)
    path.with_suffix(".md").write_text(result.table(figures))
    lines: dict[str, list[tuple[float, float]]] = {}
    for figure in figures:
        if figure.at is not None:
            lines.setdefault(figure.at[0], []).append((figure.at[1], figure.median))
    width, height, across = 420, 240, 2
    parts = []
    for index, (title, points) in enumerate(sorted(lines.items())):
        log = min(y for _, y in points) > 0 and not title.startswith("efficiency")
        chart = curves(title, {"": sorted(points)}, x_label="", log=log, size=(width - 10, height - 10))
        place = f"translate({index % across * width},{index // across * height})"
        parts.append(f'<g transform="{place}">{chart}</g>')
    total = -(-len(lines) // across) * height
    path.with_suffix(".svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across * width} {total}" '
        f'width="{across * width}" height="{total}"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _say(text: str) -> None:
    print(text)  # noqa: T201 - the answer of the command
