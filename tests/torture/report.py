"""torture.md: the lines of torture.json as a table for people.

Knows the lines' fields. Does not know how they came about.
"""

from collections.abc import Mapping
from typing import Any

_HEADS = ("code", "what", "value", "unit", "goal", "passed", "lost", "doubled", "command")


def markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page: one row per figure, then notes, then where and when they were measured."""
    passed = sum(bool(entry["passed"]) for entry in table.values())
    lines = ["# Torture results", "", f"{passed} of {len(table)} figures passed.", ""]
    lines += [_row(_HEADS), _row(["---"] * len(_HEADS))]
    lines += [_row(_cells(code, entry)) for code, entry in table.items()]
    lines += ["", "## Notes", ""]
    for code, entry in table.items():
        notes = "; ".join(f"{name}: {cell(value)}" for name, value in entry["notes"].items())
        when = f"{entry['scale']}, seed {entry['seed']}, {entry['seconds']} s, {entry['date']}"
        lines.append(f"- **{code}** ({when}) {notes}".rstrip())
    lines += ["", "## Machines and versions", ""]
    places = dict.fromkeys((e["machine"], _versions(e["versions"])) for e in table.values())
    lines += [f"- {machine}; {versions}" for machine, versions in places]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    """Return a value as short text that fits a table's cell."""
    match value:
        case None:
            text = "-"
        case bool():
            text = "yes" if value else "no"
        case int():
            text = f"{value:,}"
        case float():
            text = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        case Mapping():
            text = ", ".join(f"{name} {cell(item)}" for name, item in value.items())
        case list() | tuple():
            text = ", ".join(map(cell, value))
        case _:
            text = str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _cells(code: str, entry: Mapping[str, Any]) -> list[str]:
    plain = [cell(entry[name]) for name in ("title", "value", "unit", "goal")]
    verdict = "yes" if entry["passed"] else "**NO**"
    counts = [cell(entry[name]) for name in ("lost", "doubled")]
    return [code, *plain, verdict, *counts, f"`{entry['command']}`"]


def _row(cells: object) -> str:
    assert isinstance(cells, list | tuple)
    return f"| {' | '.join(cells)} |"


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())
