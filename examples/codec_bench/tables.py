"""Ours beside each peer at equal bytes. Knows rows; knows no runs and no files.

A peer's row is compared with our rows of the same work and seed: what ours keeps at exactly the
peer's bytes is read off the line between our two nearest ratios, bytes on a logarithmic scale. A
peer that sends more bytes than any of our rows is compared with our largest row: it then has more
bytes to spend, which is said.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean

from examples.codec_bench.results import Row, Unit

OURS = "symbiont"
"""Our methods' names begin with this."""

GOALS = {100: 0.99, 300: 0.95, 1000: 0.85}
"""Times fewer bytes -> progress that ours is to keep."""

Point = tuple[float, float]
"""Times fewer bytes, progress kept."""


def curves(
    rows: Mapping[Unit, Row], work: str, column: str = "progress_kept"
) -> dict[str, list[Point]]:
    """Method -> mean over seeds of (ratio, the column), from few times to many."""
    found: dict[tuple[str, int], list[Point]] = {}
    for (kind, _seed, method, asked), row in rows.items():
        if kind == work:
            pair = (row.value("ratio"), row.value(column))
            found.setdefault((method, asked), []).append(pair)
    lines: dict[str, list[Point]] = {}
    for (method, _asked), pairs in found.items():
        lines.setdefault(method, []).append((mean(p[0] for p in pairs), mean(p[1] for p in pairs)))
    return {method: sorted(points) for method, points in lines.items()}


def at(points: Sequence[Point], ratio: float) -> float | None:
    """The line through `points` (ascending ratios) at `ratio`; None beyond its largest ratio.

    Below its smallest ratio the first point stands: more bytes do not lower what it keeps.
    """
    if not points or ratio > points[-1][0] * 1.02:  # budgets are met to within two per cent
        return None
    if ratio <= points[0][0]:
        return points[0][1]
    for (a, low), (b, high) in pairwise(points):
        if ratio <= b:
            share = (math.log(ratio) - math.log(a)) / (math.log(b) - math.log(a))
            return low + share * (high - low)
    return points[-1][1]


def ours_of(names: Iterable[str]) -> list[str]:
    """Our methods among these."""
    return sorted(name for name in names if name.startswith(OURS))


def table(rows: Mapping[Unit, Row], works: Sequence[str], order: Sequence[str]) -> str:
    """A Markdown table for each kind of work."""
    parts = []
    for work in works:
        lines = curves(rows, work)
        if not lines:
            continue
        ours = ours_of(lines)
        head = ["method", "times fewer bytes", "kept", "cosine", "encode ms", "decode ms"]
        head += [f"{name}, same bytes" for name in ours]
        parts.append(
            f"{work}: {_reference(rows, work)}\n\n{_line(head)}\n{_line(['---'] * len(head))}"
        )
        for method in [*(m for m in order if m in lines), *(m for m in lines if m not in order)]:
            parts += _rows_of(rows, work, method, lines, ours)
        parts.append("")
    return "\n".join(parts)


def _rows_of(
    rows: Mapping[Unit, Row],
    work: str,
    method: str,
    lines: Mapping[str, list[Point]],
    ours: Sequence[str],
) -> list[str]:
    others = [curves(rows, work, c)[method] for c in ("cosine", "encode_ms", "decode_ms")]
    shown = []
    for i, (ratio, kept) in enumerate(lines[method]):
        cells = [method, f"{ratio:.4g}", f"{100 * kept:.1f} %"]
        cells += [f"{others[0][i][1]:.3f}", f"{others[1][i][1]:.1f}", f"{others[2][i][1]:.1f}"]
        for name in ours:
            found = at(lines[name], ratio) if name != method else None
            cells.append("" if found is None else _against(found, kept, lines[name][0][0] > ratio))
        shown.append(_line(cells))
    return shown


def _against(ours: float, peer: float, with_fewer: bool) -> str:
    sign = "ahead" if ours > peer else "behind"
    return f"{100 * ours:.1f} % {sign}{', with fewer bytes' if with_fewer else ''}"


def _reference(rows: Mapping[Unit, Row], work: str) -> str:
    found = [row for unit, row in rows.items() if unit[0] == work and unit[2] == "uncompressed"]
    if not found:
        return "no uncompressed run"
    before = mean(row.losses[0][1] for row in found)
    after = mean(row.losses[-1][1] for row in found)
    return (
        f"{found[0].facts['size']:,} coordinates, {found[0].losses[-1][0]} rounds, {len(found)} "
        f"seeds; held-out loss uncompressed {before:.4f} to {after:.4f} nats"
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def goals(rows: Mapping[Unit, Row], works: Sequence[str]) -> list[str]:
    """Ours beside what was aimed at."""
    lines = []
    for work in works:
        found = curves(rows, work)
        for name in ours_of(found):
            for ratio, goal in GOALS.items():
                kept = at(found[name], ratio)
                if kept is not None:
                    lines.append(
                        f"{work}, {name} at {ratio} times fewer bytes: kept {100 * kept:.1f} %, "
                        f"goal {100 * goal:.0f} % {'met' if kept >= goal else 'missed'}"
                    )
    return lines


def codec_files(rows: Mapping[Unit, Row]) -> list[str]:
    """What codec files took, for methods that send one: in `bytes` already, told apart here."""
    lines = []
    for unit, row in sorted(rows.items()):
        if row.facts["codec_bytes"]:
            lines.append(
                f"{unit[0]} seed {unit[1]}, {unit[2]} at {unit[3] or 'its own ratio'}: codec files "
                f"{row.facts['codec_bytes']:,} bytes a device, codes "
                f"{row.facts['code_bytes']:,.0f} bytes an update"
            )
    return lines
