"""Charts as SVG text, for the report and the benchmarks: curves and stacked bars, without a plotting
library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]  # x, y
INK, FAINT = "#222", "#ddd"
LINES = ("#1f6fb2", "#d1495b", "#2e8b57", "#b8860b", "#7b52ab", "#555")


def curves(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    *,
    x_label: str = "step",
    log: bool = False,
    size: tuple[int, int] = (300, 170),
) -> str:
    """One chart; ``lines`` by name, each in order of x; points that are not finite are left out, and so are
    those not above 0 when both axes are logarithmic (``log``)."""
    width, height = size
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (not log or (x > 0 and y > 0))]
        for name, points in lines.items()
    }
    every = [point for points in kept.values() for point in points]
    if not every:
        return ""
    across = _Axis([x for x, _ in every], (46, width - 12), log=log)
    up = _Axis([y for _, y in every], (height - 30, 26), log=log)
    parts = [_open(width, height), f'<text x="46" y="15" font-weight="bold">{escape(title)}</text>']
    for y in up.ticks:
        parts.append(f'<path d="M46,{up(y):.1f} H{width - 12}" stroke="{FAINT}"/>')
        parts.append(f'<text x="42" y="{up(y) + 3:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in across.ticks:
        parts.append(f'<text x="{across(x):.1f}" y="{height - 16}" text-anchor="middle">{_number(x)}</text>')
    parts.append(
        f'<text x="{width - 12}" y="{height - 3}" text-anchor="end" fill="#777">{escape(x_label)}</text>'
    )
    for index, (name, points) in enumerate(kept.items()):
        colour = LINES[index % len(LINES)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(points) < 30:
            parts += [
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2" fill="{colour}"/>' for x, y in points
            ]
        if len(kept) > 1:
            parts.append(
                f'<text x="{46 + 90 * index}" y="{height - 3}" fill="{colour}">{escape(name)}</text>'
            )
    return "".join([*parts, "</svg>"])


def bars(title: str, columns: Sequence[tuple[str, Mapping[str, float]]], colours: Mapping[str, str]) -> str:
    """Stacked bars of shares that add up to 1, one per column, in the order of ``colours``."""
    width, height, left = 900, 190, 34
    parts = [_open(width, height), f'<text x="{left}" y="15" font-weight="bold">{escape(title)}</text>']
    bottom, full = height - 22, height - 46
    each = (width - left) / max(1, len(columns))
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * full
        parts.append(f'<text x="{left - 4}" y="{y + 3:.1f}" text-anchor="end">{share:.0%}</text>')
    for index, (label, shares) in enumerate(columns):
        x, y = left + index * each, float(bottom)
        for cause, colour in colours.items():
            share = shares.get(cause, 0.0)
            y -= share * full
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.5, each * 0.9):.1f}" '
                f'height="{share * full:.1f}" fill="{colour}"><title>{escape(label)}: {escape(cause)} '
                f"{share:.1%}</title></rect>"
            )
        if index % math.ceil(len(columns) / 24) == 0:
            middle = x + each * 0.45
            parts.append(
                f'<text x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{escape(label)}</text>'
            )
    return "".join([*parts, "</svg>"])


class _Axis:
    """From values to pixels, with a few round ticks."""

    def __init__(self, values: Sequence[float], pixels: tuple[float, float], *, log: bool) -> None:
        self._log, self._pixels = log, pixels
        low, high = min(values), max(values)
        if log:
            self._low, self._high = math.log(low), math.log(high if high > low else low * 2)
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            decades = [10.0**power for power in range(first, last + 1)]
            inside = [tick for tick in decades if low <= tick <= high]
            self.ticks = inside if len(inside) > 1 else [low, high]
            return
        if high <= low:
            low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
        step = _round_step((high - low) / 3)
        self._low, self._high = low, high
        count = math.floor(high / step) - math.ceil(low / step) + 1
        self.ticks = [(math.ceil(low / step) + k) * step for k in range(count)]

    def __call__(self, value: float) -> float:
        at = math.log(value) if self._log else value
        start, end = self._pixels
        return start + (at - self._low) / (self._high - self._low) * (end - start)


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _number(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:.4g}"


def _open(width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="10" fill="{INK}">'
    )
