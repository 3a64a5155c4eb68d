"""The demo's results as a terminal table and as one self-contained HTML page.

Knows how results look. Does not know how they were measured: every number comes in `Results`.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group
from rich.table import Table


@dataclass(slots=True)
class DeviceResult:
    """One device: accuracies in [0, 1] in the order its models arrived, bytes, speed, memory."""

    name: str
    family: str
    accuracy: list[tuple[str, float]] = field(default_factory=list)
    heldout: int = 0
    examples: int = 0
    raw_bytes: int = 0
    sent_bytes: int = 0
    cosine: list[float] = field(default_factory=list)
    tokens_per_s: float = 0.0
    peak_mb: float = 0.0

    @property
    def before(self) -> float:
        return self.accuracy[0][1] if self.accuracy else 0.0

    @property
    def after(self) -> float:
        return self.accuracy[-1][1] if self.accuracy else 0.0


@dataclass(slots=True)
class Results:
    """Everything a run measured; sizes in bytes, times in seconds, accuracies in [0, 1]."""

    title: str
    facts: dict[str, str]
    devices: list[DeviceResult]
    llm: list[tuple[str, float]]
    rounds: list[dict[str, float]]
    stages: dict[str, float]
    releases: list[dict[str, str]]
    wire_up: int
    wire_down: int

    @property
    def raw_bytes(self) -> int:
        return sum(device.raw_bytes for device in self.devices)

    @property
    def sent_bytes(self) -> int:
        return sum(device.sent_bytes for device in self.devices)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def size(value: float) -> str:
    """`value` bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def number(value: float) -> str:
    """Whole numbers with thousands separators, others with three decimals."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


LEARNING = ("who", "model", "before", "after", "points", "tokens/s", "peak MB")
SENDING = ("who", "updates", "as float32", "sent", "fewer", "fidelity")


def learning_rows(results: Results) -> list[list[str]]:
    """Rows under LEARNING: one per device, and one for the LLM."""
    rows = [
        [
            d.name,
            d.family,
            percent(d.before),
            percent(d.after),
            f"{100 * (d.after - d.before):+.1f}",
            f"{d.tokens_per_s:,.0f}",
            f"{d.peak_mb:.0f}",
        ]
        for d in results.devices
    ]
    if results.llm:
        first, last = results.llm[0][1], results.llm[-1][1]
        gain = f"{100 * (last - first):+.1f}"
        rows.append(["coordinator", "LLM", percent(first), percent(last), gain, "", ""])
    return rows


def sending_rows(results: Results) -> list[list[str]]:
    """Rows under SENDING: one per device, and their sum."""
    rows = [
        [
            d.name,
            str(len(d.cosine)),
            size(d.raw_bytes),
            size(d.sent_bytes),
            f"{d.raw_bytes / max(d.sent_bytes, 1):.0f}x",
            f"{mean(d.cosine):.2f}",
        ]
        for d in results.devices
    ]
    rows.append(
        [
            "all",
            str(sum(len(d.cosine) for d in results.devices)),
            size(results.raw_bytes),
            size(results.sent_bytes),
            f"{results.raw_bytes / max(results.sent_bytes, 1):.0f}x",
            f"{mean([c for d in results.devices for c in d.cosine]):.2f}",
        ]
    )
    return rows


def stage_rows(results: Results) -> list[list[str]]:
    """Stages and their seconds, the longest first."""
    return [[k, f"{v:.1f}"] for k, v in sorted(results.stages.items(), key=lambda kv: -kv[1])]


def terminal(results: Results) -> Group:
    """The tables printed at the end of the demo."""
    return Group(
        _table(results.title, LEARNING, learning_rows(results)),
        _table("What left the devices", SENDING, sending_rows(results)),
        _table("Seconds per stage, summed over processes", ("stage", "s"), stage_rows(results)),
    )


def _table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", min_width=min(len(title) + 4, 76))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


# --- the page -----------------------------------------------------------------------------------

CSS = """
:root{--ink:#1c2330;--soft:#5b6577;--line:#dfe3ea;--page:#fff;--card:#f7f8fa;--a:#9aa7bd;--b:#1f6feb;
--c:#d97706}
@media(prefers-color-scheme:dark){:root{--ink:#e8ebf1;--soft:#9aa5b8;--line:#303846;--page:#12161d;
--card:#1a202a;--a:#5d6b82;--b:#5b9dff;--c:#f0a542}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1040px;padding:2rem 1.25rem 4rem;color:var(--ink);
background:var(--page);font:16px/1.5 system-ui,sans-serif}h1{font-size:1.6rem;margin:0 0 .25rem}
h2{font-size:1.1rem;margin:2.25rem 0 .5rem}p{color:var(--soft);margin:.25rem 0 1rem;max-width:68ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:.75rem;margin:1.5rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.9rem 1rem}
.tile b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);
font-size:.86rem}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem;
font-variant-numeric:tabular-nums}th,td{padding:.45rem .6rem;border-bottom:1px solid var(--line);
text-align:right;white-space:nowrap}th{color:var(--soft);font-weight:600}td:first-child,
th:first-child{text-align:left}svg{width:100%;height:auto;display:block}svg text{fill:var(--ink);
font:13px system-ui,sans-serif}svg .soft{fill:var(--soft)}.key i{display:inline-block;width:.8em;height:.8em;
border-radius:2px;margin:0 .35em 0 1em}footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
"""


def bar_chart(rows: list[tuple[str, list[tuple[float, str, str]]]], top: float, label: str) -> str:
    """Horizontal bars; each row is (name, [(value, css colour, text)]) on a scale from 0 to `top`."""
    bar, gap, left, width = 16, 14, 175, 960
    y, parts = 6, []
    for name, bars in rows:
        middle = y + len(bars) * bar / 2 + 4
        parts.append(f'<text x="{left - 10}" y="{middle:.0f}" text-anchor="end">{esc(name)}</text>')
        for value, colour, text in bars:
            w = max(2.0, (width - left - 170) * value / top) if top > 0 else 2.0
            parts.append(
                f'<rect x="{left}" y="{y}" width="{w:.1f}" height="{bar - 3}" rx="2" '
                f'style="fill:var(--{colour})"/>'
                f'<text class="soft" x="{left + w + 8:.1f}" y="{y + 11}">{esc(text)}</text>'
            )
            y += bar
        y += gap
    return f'<svg viewBox="0 0 {width} {y}" role="img" aria-label="{esc(label)}">{"".join(parts)}</svg>'


def line_chart(series: list[tuple[str, str, list[float]]], ticks: list[str], label: str) -> str:
    """Lines over common ticks on a scale of 0 to 100 %; a series is (name, css colour, values)."""
    width, height, left, bottom, right = 960, 280, 50, 34, 130
    n = max(len(ticks) - 1, 1)

    def at(i: int, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * i / n
        return x, (height - bottom) - (height - bottom - 14) * value

    parts = []
    for grid in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = at(0, grid)
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" '
            f'style="stroke:var(--line)"/><text class="soft" x="{left - 8}" y="{y + 4:.1f}" '
            f'text-anchor="end">{grid * 100:.0f}%</text>'
        )
    for i, tick in enumerate(ticks):
        x, _ = at(i, 0)
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{height - 10}" text-anchor="middle">{esc(tick)}</text>'
        )
    for name, colour, values in series:
        points = [at(i, v) for i, v in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" style="fill:none;stroke:var(--{colour});stroke-width:2.5"/>'
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:var(--{colour})"/>'
            for x, y in points
        ]
        if points:
            x, y = points[-1]
            parts.append(f'<text x="{x + 10:.1f}" y="{y + 4:.1f}">{esc(name)}</text>')
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(label)}">'
        f"{''.join(parts)}</svg>"
    )


def esc(text: str) -> str:
    return html.escape(text, quote=True)


def html_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{esc(c)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(f'<td>{esc(c)}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tile(value: str, text: str) -> str:
    return f'<div class="tile"><b>{esc(value)}</b><span>{esc(text)}</span></div>'


def page(results: Results) -> str:
    """The whole report as one HTML document without any outside reference."""
    devices = results.devices
    before, after = mean([d.before for d in devices]), mean([d.after for d in devices])
    fewer = results.raw_bytes / max(results.sent_bytes, 1)
    tiles = [
        tile(f"{percent(before)} → {percent(after)}", "small models, mean over the devices"),
        tile(f"{fewer:.0f}x", "fewer bytes per update than float32"),
        tile(f"{mean([d.tokens_per_s for d in devices]):,.0f}", "tokens per second on a device"),
        tile(f"{max((d.peak_mb for d in devices), default=0):.0f} MB", "peak memory of a device"),
    ]
    if results.llm:
        llm_text = f"{percent(results.llm[0][1])} → {percent(results.llm[-1][1])}"
        tiles.insert(1, tile(llm_text, "large model on the same task"))
    accuracy = [
        (
            d.name,
            [
                (d.before, "a", f"{percent(d.before)} before"),
                (d.after, "b", f"{percent(d.after)} after"),
            ],
        )
        for d in devices
    ]
    steps = [name for name, _ in devices[0].accuracy] if devices else []
    series = []
    if devices and all(len(d.accuracy) == len(steps) for d in devices):
        means = [mean([d.accuracy[i][1] for d in devices]) for i in range(len(steps))]
        series.append(("small models", "b", means))
    if len(results.llm) == len(steps):
        series.append(("large model", "c", [value for _, value in results.llm]))
    sent = [
        (
            d.name,
            [
                (float(d.raw_bytes), "a", f"{size(d.raw_bytes)} as float32"),
                (float(d.sent_bytes), "b", f"{size(d.sent_bytes)} sent"),
            ],
        )
        for d in devices
    ]
    stages = [
        (name, [(seconds, "b", f"{seconds:.1f} s")])
        for name, seconds in sorted(results.stages.items(), key=lambda kv: -kv[1])
    ]
    round_columns = tuple(results.rounds[0]) if results.rounds else ()
    round_rows = [[number(value) for value in row.values()] for row in results.rounds]
    release_columns = tuple(results.releases[0]) if results.releases else ()
    release_rows = [list(row.values()) for row in results.releases]
    facts = [[key, value] for key, value in results.facts.items()]
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{esc(results.title)}</title>
<style>{CSS}</style></head><body>
<h1>{esc(results.title)}</h1>
<p>Each device trained on its own text; only sealed, encoded adapter updates left it. Accuracies are
measured on each device's own held-out text, in ONNX Runtime.</p>
<div class="tiles">{"".join(tiles)}</div>
<h2>Results</h2>{html_table(LEARNING, learning_rows(results))}
<h2>Accuracy per device</h2><p class="key"><i style="background:var(--a)"></i>before
<i style="background:var(--b)"></i>after</p>
{bar_chart(accuracy, 1.0, "accuracy per device before and after")}
<h2>Accuracy over the releases</h2>{line_chart(series, steps, "accuracy over the releases")}
<h2>Bytes of the updates</h2>
<p>Payload of all updates of a device, against the same numbers as plain float32. On the wire, headers,
models and synthetic data included: {size(results.wire_up)} up, {size(results.wire_down)} down.</p>
{html_table(SENDING, sending_rows(results))}<br>
{bar_chart(sent, max((float(d.raw_bytes) for d in devices), default=1.0), "bytes per device")}
<h2>Rounds</h2>
<p>Fidelity is the cosine between an update and what the coordinator decodes; the mean score is what the twins think of the
texts the large model wrote; kept texts join the synthetic set that goes to the devices.</p>
{html_table(round_columns, round_rows)}
<h2>Releases</h2>{html_table(release_columns, release_rows)}
<h2>Seconds per stage</h2><p>Summed over the processes, which share the machine's cores.</p>
{bar_chart(stages, max(results.stages.values(), default=1.0), "seconds per stage")}
<h2>This run</h2>{html_table(("fact", "value"), facts)}
<footer>Made by Symbiont's demo. Every number on this page was measured in the run it describes.</footer>
</body></html>
"""


def write_html(results: Results, path: Path) -> None:
    """Write the report to `path`, replacing it."""
    path.write_text(page(results), encoding="utf-8")
