"""The result as one SVG: a panel for each kind of work, a line for each method. Knows shapes.

Does not know rows. Written by hand, as `examples/learning/plot.py` is and for its reason.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from examples.codec_bench.tables import OURS, Point

COLOURS = (
    "#9aa0a6", "#e8a33d", "#4a7fd1", "#3a9d6e", "#8b62c9", "#7a5c46", "#2aa5b0", "#b0b43a",
    "#d46aa0", "#5d6b78", "#e0793a", "#6fae3a",
)  # fmt: skip
OUR_COLOURS = ("#c2185b", "#7b0a3a", "#ff5c93")
LEFT, WIDTH, HEIGHT, GAP, TOP = 60, 700, 300, 70, 40
LEAST, MOST = 2.0, 3000.0
"""Ends of the axis of ratios, logarithmic."""

LOW, HIGH = 0.0, 1.1
"""Ends of the axis of progress."""


def lines_plot(
    panels: Mapping[str, Mapping[str, Sequence[Point]]], names: Sequence[str], title: str
) -> str:
    """`panels`: title -> method -> points (times fewer bytes, progress kept)."""
    parts = [_legend(names)]
    y = TOP + 18.0 * -(-len(names) // 4) + 30
    for panel, lines in panels.items():
        parts.append(f'<text x="{LEFT}" y="{y - 10}" font-weight="bold">{escape(panel)}</text>')
        parts.append(_axes(y))
        shown = [name for name in names if name in lines]
        parts += [_curve(lines[n], y, _colour(n, names), n.startswith(OURS)) for n in shown]
        y += HEIGHT + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {round(y)}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="{escape(title)}"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


def _colour(name: str, names: Sequence[str]) -> str:
    ours = [n for n in names if n.startswith(OURS)]
    if name in ours:
        return OUR_COLOURS[ours.index(name) % len(OUR_COLOURS)]
    peers = [n for n in names if n not in ours]
    return COLOURS[peers.index(name) % len(COLOURS)]


def _legend(names: Sequence[str]) -> str:
    parts = []
    for i, name in enumerate(names):
        x, y = LEFT + (i % 4) * 180, TOP + (i // 4) * 18
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{_colour(name, names)}"/>')
        parts.append(f'<text x="{x + 9}" y="{y}">{escape(name)}</text>')
    return "".join(parts)


def _axes(top: float) -> str:
    parts = []
    for ratio in (3, 10, 30, 100, 300, 1000, 3000):
        x = _x(ratio)
        parts.append(f'<path d="M{x:.1f} {top}V{top + HEIGHT}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{top + HEIGHT + 15}" text-anchor="middle" fill="#777">'
            f"{ratio}x</text>"
        )
    for tick in range(0, 101, 20):
        y = _y(tick / 100, top)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + WIDTH}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#777">{tick} %</text>'
        )
    return "".join(parts)


def _curve(points: Sequence[Point], top: float, colour: str, ours: bool) -> str:
    at = [(_x(ratio), _y(kept, top)) for ratio, kept in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{colour}"/>' for x, y in at)
    width = 2.6 if ours else 1.4
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>{dots}'


def _x(ratio: float) -> float:
    share = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LEFT + share * WIDTH


def _y(kept: float, top: float) -> float:
    return top + HEIGHT * (1 - (min(max(kept, LOW), HIGH) - LOW) / (HIGH - LOW))
