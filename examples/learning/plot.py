"""The result as one SVG: a row of dots per task, one colour per setting, whiskers of one deviation.

Knows shapes. Does not know rows or tests. Written by hand rather than with matplotlib, which would
be 60 MB of dependencies for one figure; the demo's report draws its own SVG too.
"""

from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]
"""Mean and standard deviation, in [0, 1]."""

COLOURS = (
    "#9aa0a6",
    "#e8a33d",
    "#4a7fd1",
    "#c2385a",
    "#3a9d6e",
    "#8b62c9",
    "#7a5c46",
    "#2aa5b0",
    "#b0b43a",
)
LEFT, WIDTH, ROW, GAP, TOP = 90, 760, 11, 16, 40


def dot_plot(
    panels: Mapping[str, Mapping[str, Mapping[str, Point]]], names: Sequence[str], title: str
) -> str:
    """`panels`: panel -> task -> name -> point; `names` fixes the colours' order."""
    parts: list[str] = []
    y = float(TOP)
    for i, name in enumerate(names):
        x: float = LEFT + (i % 4) * 200
        at = y + (i // 4) * 18
        parts.append(f'<circle cx="{x}" cy="{at - 4}" r="4" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 9}" y="{at}">{escape(name)}</text>')
    y += 18 * (-(-len(names) // 4)) + 8
    for panel, tasks in panels.items():
        y += 26
        parts.append(f'<text x="{LEFT}" y="{y - 8}" font-weight="bold">{escape(panel)}</text>')
        top = y
        for task, points in tasks.items():
            shown = [(i, points[name]) for i, name in enumerate(names) if name in points]
            middle = y + (len(shown) * ROW) / 2 + 4
            parts.append(
                f'<text x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{escape(task)}</text>'
            )
            for i, (value, spread) in shown:
                y += ROW
                parts.append(_dot(value, spread, y - ROW / 2, COLOURS[i % len(COLOURS)]))
            y += GAP
        for tick in range(0, 101, 20):
            x = _x(tick / 100)
            parts.append(f'<path d="M{x:.1f} {top}V{y - GAP / 2:.1f}" stroke="#ddd"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{y + 8:.1f}" text-anchor="middle" fill="#777">{tick}</text>'
            )
        y += 18
    height = round(y + 12)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="{escape(title)}">'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


def _x(value: float) -> float:
    return LEFT + min(1.0, max(0.0, value)) * WIDTH


def _dot(value: float, spread: float, y: float, colour: str) -> str:
    low, high = _x(value - spread), _x(value + spread)
    return (
        f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{colour}" stroke-width="2" opacity=".5"/>'
        f'<circle cx="{_x(value):.1f}" cy="{y:.1f}" r="3.6" fill="{colour}"/>'
    )
