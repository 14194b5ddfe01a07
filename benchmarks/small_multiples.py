"""One small line chart per series, the others in grey behind it, as SVG: many lines stay readable, and no
plotting library is needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, COLUMNS = 210, 150, 4  # of a panel, in pixels; panels in a row
LEFT, TOP, RIGHT, BOTTOM = 34, 24, 10, 20  # margins inside a panel
INK, GREY, LINE = "#222", "#ccc", "#1f6fb2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    points: Sequence[tuple[float, float]]  # (x, y), in order of x


def draw(panels: Sequence[Panel], *, x_label: str, y_label: str, y_range: tuple[float, float]) -> str:
    """The SVG's text. All panels share both axes."""
    last = max(x for panel in panels for x, _ in panel.points)
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="10" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="{height - 8}">{escape(y_label)} by {escape(x_label)}</text>',
    ]
    for index, panel in enumerate(panels):
        origin = f"translate({index % COLUMNS * WIDTH},{index // COLUMNS * HEIGHT})"
        others = [other for other in panels if other is not panel]
        parts.append(f'<g transform="{origin}">{_panel(panel, others, last, y_range)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, others: Sequence[Panel], last: float, y_range: tuple[float, float]) -> str:
    def place(x: float, y: float) -> str:
        share = (min(max(y, y_range[0]), y_range[1]) - y_range[0]) / (y_range[1] - y_range[0])
        across = LEFT + x / last * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM):.1f}"

    def curve(points: Sequence[tuple[float, float]], colour: str, stroke: float) -> str:
        path = " ".join(place(x, y) for x, y in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{stroke}"/>'

    x0, bottom = LEFT, HEIGHT - BOTTOM
    axis = ""
    for tick in (y_range[0], sum(y_range) / 2, y_range[1]):
        y = float(place(0, tick).split(",")[1]) + 3
        axis += f'<text x="{x0 - 4}" y="{y:.1f}" text-anchor="end">{tick:g}</text>'
    final = panel.points[-1][1]
    return "".join(
        [
            f'<text x="{x0}" y="14" font-weight="bold">{escape(panel.title)}</text>',
            f'<text x="{WIDTH - RIGHT}" y="14" text-anchor="end" fill="{LINE}">{final:.3f}</text>',
            f'<path d="M{x0},{TOP} V{bottom} H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>',
            axis,
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{last:g}</text>',
            f'<text x="{x0}" y="{HEIGHT - 6}">0</text>',
            *(curve(other.points, GREY, 1) for other in others),
            curve(panel.points, LINE, 2),
        ]
    )
