"""``quartet report RUN``: metrics, trace and samples of a run as one page that opens anywhere.

Reads what the run has written and nothing else, so it works on a run that goes on, that failed, or that was
copied from another machine. A run without a trace, or without samples, has a page without that part.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from launch.charts import bars, curves
from launch.report_page import SCRIPT, STYLE
from launch.trace import STEPS, Event, read_trace
from launch.tracking import read_metrics
from orchestrator import metrics as names

COLOURS = {  # of work and of the causes of a loss: the same on every chart
    "generate": "#1f6fb2", "update": "#d1495b", "reward": "#2e8b57", "score": "#66a86b", "send": "#b8860b",
    "receive": "#dba72b", "sleep": "#7b52ab", "probe": "#8c8c8c", "save": "#555", "load": "#555",
    "wait": "#f1f1f1",
}  # fmt: skip
SHARES = {
    "useful": "#2e8b57", "sync": "#dba72b", "sleep": "#7b52ab", "other": "#8c8c8c",
    "wait_generate": "#a9c9e6",
    "wait_update": "#ecb3bb", "wait_score": "#bfe0c2", "wait_sync": "#f0dfae", "wait_sleep": "#d9cbe8",
    "wait_other": "#d8d8d8", "driver": "#222",
}  # fmt: skip
FIRST_CURVES = (
    names.REWARD, "heldout_accuracy", names.KL, names.LOSS, names.ACCURACY, names.ENTROPY,
    names.RESPONSE_TOKENS, names.TRUNCATED_FRACTION, names.TOKENS_PER_S, names.STEP_S,
    names.DEVICE + "useful", names.SCORING_HIDDEN, names.OVERHEAD_FRACTION,
)  # fmt: skip
NOT_DRAWN = ("stage", "step", "time")
SHOWN_STEPS = 3  # of the timeline, at first
MAX_EVENTS = 60_000  # of the timeline; of a longer run the last
MAX_SAMPLES = 24
MICRO = 1e6

Line = dict[str, Any]


def main(folder: Path) -> int:
    """Writes ``folder/report.html``; ValueError when there is no run."""
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} holds no metrics.jsonl; give the run_dir of a run that has made a step")
    path = folder / "report.html"
    path.write_text(page(folder))
    print(path)  # noqa: T201 - the answer of the command
    return 0


def page(folder: Path) -> str:
    """The HTML of a run."""
    lines = read_metrics(folder / "metrics.jsonl")
    trace = read_trace(folder / "trace.json") if (folder / "trace.json").exists() else []
    samples = _json_lines(folder / "samples.jsonl")
    config = (folder / "config.yaml").read_text() if (folder / "config.yaml").exists() else ""
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    by_stage = {stage: [line for line in lines if line["stage"] == stage] for stage in stages}
    title = folder.absolute().name
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)} · Quartet</title>'
        f"<style>{STYLE}</style><h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(", ".join(f"{s}: {_last_step(by_stage[s])} steps" for s in stages))}</p>',
        _tiles(by_stage[stages[-1]]) if stages else "",
    ]
    for stage, own in by_stage.items():
        parts.append(f"<h2>{escape(stage)}</h2>{_curves(own)}")
        parts.append(_time(own))
    parts += [_timeline(trace), _samples(samples), _config(config)]
    return "".join(parts) + "</html>\n"


def _last_step(lines: Sequence[Line]) -> int:
    return max(line["step"] for line in lines)


def _median(lines: Sequence[Line], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return statistics.median(values) if values else None


def _tiles(lines: Sequence[Line]) -> str:
    """Figures of the last stage at a glance: the last value of what is learned, medians of what is spent."""
    last = {name: value for line in lines for name, value in line.items() if value is not None}
    warm = [line for line in lines if names.STEP_S in line][1:]
    shown = [
        ("reward", last.get(names.REWARD), ".3f"), ("held-out accuracy", last.get("heldout_accuracy"), ".3f"),
        ("loss", last.get(names.LOSS), ".3f"), ("tokens/s", _median(warm, names.TOKENS_PER_S), ",.0f"),
        ("seconds per step", _median(warm, names.STEP_S), ".2f"),
        ("device time of use", _median(warm, names.DEVICE + "useful"), ".1%"),
        ("scoring hidden", _median(warm, names.SCORING_HIDDEN), ".1%"),
        ("driver overhead", _median(warm, names.OVERHEAD_FRACTION), ".2%"),
    ]  # fmt: skip
    tiles = [
        f'<div class="tile"><b>{value:{form}}</b><span>{name}</span></div>'
        for name, value, form in shown
        if value is not None
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _curves(lines: Sequence[Line]) -> str:
    """The curves that say most; the others folded away."""
    every = dict.fromkeys(name for line in lines for name in line if name not in NOT_DRAWN)
    first = [name for name in FIRST_CURVES if name in every]
    first += [name for name in every if name.endswith("/" + names.LOSS)]
    rest = [name for name in every if name not in first]
    shown, folded = (f'<div class="charts">{_charts(lines, some)}</div>' for some in (first, rest))
    return shown + (f"<details><summary>{len(rest)} more</summary>{folded}</details>" if rest else "")


def _charts(lines: Sequence[Line], wanted: Sequence[str]) -> str:
    charts = (
        curves(name, {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None]})
        for name in wanted
    )
    return "".join(charts)


def _time(lines: Sequence[Line]) -> str:
    """Device time by cause per step, and what each phase took."""
    columns = [
        (str(line["step"]), _prefixed(line, names.DEVICE))
        for line in lines
        if names.DEVICE + "useful" in line
    ]
    if not columns:
        return ""
    warm = columns[1:] or columns
    means = {cause: sum(shares.get(cause, 0.0) for _, shares in warm) / len(warm) for cause in SHARES}
    keys = "".join(
        f'<span class="key" style="background:{colour}"></span>{cause} {means[cause]:.1%}'
        for cause, colour in SHARES.items()
        if means[cause] > 0
    )
    chart = bars("device time by cause, per step", columns, SHARES)
    return (
        f"<h3>Where the device time went</h3>{chart}<p>{keys} (means without the first step)</p>"
        + _phases([line for line in lines if names.STEP_S in line])
    )


def _phases(lines: Sequence[Line]) -> str:
    warm = lines[1:] or lines
    phases = dict.fromkeys(name for line in warm for name in line if name.startswith(names.SECONDS))
    if not phases:
        return ""
    step_s = _median(warm, names.STEP_S) or 1.0
    rows = "".join(
        f'<tr><td>{escape(name.removeprefix(names.SECONDS))}</td><td class="n">{seconds:.3f}</td>'
        f'<td class="n">{seconds / step_s:.1%}</td></tr>'
        for name in phases
        if (seconds := _median(warm, name)) is not None
    )
    return (
        "<h3>Phases, as the driver sees them</h3><table><tr><th>phase<th>median s<th>of the step</tr>"
        f'{rows}<tr><td>step</td><td class="n">{step_s:.3f}</td><td class="n">100%</td></tr></table>'
        "<p>Phases overlap, so that they may add up to more than the step.</p>"
    )


def _timeline(trace: Sequence[Event]) -> str:
    events = [event for event in trace if event["ph"] == "X"][-MAX_EVENTS:]
    if not events:
        return ""
    titles = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    rows = list(dict.fromkeys(titles.values()))
    rows.sort(key=lambda name: name != STEPS)  # stable: the others in order of appearance
    zero = min(event["ts"] for event in events)
    drawn = [
        [
            rows.index(titles[event["pid"], event["tid"]]), (event["ts"] - zero) / MICRO,
            (event["ts"] + event["dur"] - zero) / MICRO, event["name"], event["args"].get("for", ""),
        ]
        for event in events
    ]  # fmt: skip
    drawn.sort(key=lambda event: event[3] != "wait")
    steps = sorted(event[1:3] for event in drawn if event[0] == 0 and rows[0] == STEPS)
    shown = (
        [steps[-min(SHOWN_STEPS, len(steps))][0], steps[-1][1]] if steps else [0, max(e[2] for e in drawn)]
    )
    data = {"rows": rows, "events": drawn, "colours": COLOURS, "first": shown}
    text = json.dumps(data).replace("</", "<\\/")
    keys = "".join(
        f'<span class="key" style="background:{COLOURS[name]}"></span>{name}'
        for name in COLOURS
        if any(event[3] == name for event in drawn)
    )
    return (
        "<h2>Timeline</h2><p>One row per worker, by the workers' clocks; the wheel zooms, dragging moves. "
        'The same in <code>trace.json</code>, for Perfetto.</p><button id="first">last steps</button>'
        f'<button id="all">whole run</button>{keys}<canvas id="timeline"></canvas><div id="tip"></div>'
        f"<script>const data = {text};{SCRIPT}</script>"
    )


def _samples(samples: Sequence[Line]) -> str:
    if not samples:
        return ""
    rows = "".join(
        f'<tr><td class="n">{sample["step"]}</td><td class="text">{escape(str(sample["prompt"]))}</td>'
        f'<td class="text">{escape(str(sample["response"]))}</td>'
        f'<td class="text">{escape(str(sample.get("label") or ""))}</td>'
        f'<td class="n">{sample["reward"]:.3f}</td></tr>'
        for sample in samples[-MAX_SAMPLES:]
    )
    head = "<tr><th>step<th>prompt<th>response<th>label<th>reward</tr>"
    return f"<h2>Samples</h2><table>{head}{rows}</table>"


def _config(text: str) -> str:
    folded = f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
    return f"<h2>Run</h2>{folded}" if text else ""


def _prefixed(line: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): value
        for name, value in line.items()
        if name.startswith(prefix) and value is not None
    }


def _json_lines(path: Path) -> list[Line]:
    """A killed run may leave a torn last line."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
