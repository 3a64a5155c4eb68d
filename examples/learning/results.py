"""The result file: a CSV of rows, and beside it what they were made with and which are complete.

Knows rows and files. Does not know how a row is measured.

`NAME.csv` has the columns `COLUMNS`. `NAME.json` names the configuration (and its hash), the
command, versions, and every finished unit: one (program, task, seed, setting, ablation) with the
core-seconds it took. Both are replaced whole after every unit, the CSV first, so a run may be
killed at any time: rows whose unit is not listed as finished are dropped and computed again.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.result_files import replace_text

COLUMNS = ("program", "task", "setting", "ablation", "seed", "model", "role", "metric", "value")

Unit = tuple[str, str, str, str, int]
"""program, task, setting, ablation, seed."""


class ResultsError(ValueError):
    """A result file cannot be continued."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number of one unit; `value` is text where a program does not apply."""

    unit: Unit
    model: str
    role: str
    metric: str
    value: float | str

    def cells(self) -> tuple[str, ...]:
        """As in the CSV."""
        shown = self.value if isinstance(self.value, str) else f"{self.value:.6f}"
        return (*map(str, self.unit), self.model, self.role, self.metric, shown)


@dataclass
class Results:
    """Finished units and their rows.

    Attributes:
        seconds: core-seconds of each finished unit.
    """

    path: Path
    configuration: Mapping[str, Any]
    facts: Mapping[str, Any]
    rows: dict[Unit, list[Row]] = field(default_factory=dict)
    seconds: dict[Unit, float] = field(default_factory=dict)

    @property
    def side(self) -> Path:
        """The file beside the CSV."""
        return self.path.with_suffix(".json")

    @property
    def key(self) -> str:
        """Hash of the configuration."""
        return hashlib.sha256(_json(self.configuration).encode()).hexdigest()

    def load(self) -> None:
        """Take up the finished units of an earlier run.

        Raises:
            ResultsError: the files were made with another configuration, or are damaged.
        """
        if not self.side.exists():
            if self.path.exists():
                raise ResultsError(
                    f"{self.path} has no {self.side.name} beside it; choose another --out"
                )
            return
        try:
            held = json.loads(self.side.read_text(encoding="utf-8"))
            lines = list(csv.reader(io.StringIO(self.path.read_text(encoding="utf-8"))))
            if held["configuration_sha256"] != self.key:
                raise ResultsError(
                    f"{self.path} was made with another configuration "
                    f"({_differences(held['configuration'], self.configuration)}); "
                    "choose another --out, or remove it to begin anew"
                )
            done = {unit_of(entry["unit"]): float(entry["core_s"]) for entry in held["units"]}
            if tuple(lines[0]) != COLUMNS:
                raise ResultsError(f"{self.path} has the columns {lines[0]}, expected {COLUMNS}")
            for cells in lines[1:]:
                unit = unit_of(cells[:5])
                if unit in done:
                    model, role, metric, value = cells[5:]
                    row = Row(unit, model, role, metric, _value(value))
                    self.rows.setdefault(unit, []).append(row)
        except (OSError, KeyError, IndexError, TypeError, json.JSONDecodeError) as exc:
            raise ResultsError(f"{self.path} cannot be continued: {exc!r}; remove it") from exc
        self.seconds = {unit: done[unit] for unit in self.rows}

    def add(self, unit: Unit, rows: Iterable[Row], core_s: float) -> None:
        """Store a finished unit."""
        self.rows[unit], self.seconds[unit] = list(rows), core_s
        self.save()

    def save(self) -> None:
        """Write both files, each whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for unit in sorted(self.rows):
            writer.writerows(row.cells() for row in self.rows[unit])
        replace_text(self.path, text.getvalue())
        units = [
            {"unit": list(unit), "core_s": round(self.seconds[unit], 2)}
            for unit in sorted(self.rows)
        ]
        side = {
            "configuration_sha256": self.key,
            "configuration": self.configuration,
            **self.facts,
            "units": units,
        }
        replace_text(self.side, json.dumps(side, indent=1, sort_keys=True) + "\n")


def unit_of(cells: Iterable[Any]) -> Unit:
    """The unit that a row's first five cells name."""
    program, task, setting, ablation, seed = cells
    return str(program), str(task), str(setting), str(ablation), int(seed)


def _value(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*old, *new}) if _json(old.get(name)) != _json(new.get(name))]
    return f"it differs in {', '.join(names)}"
