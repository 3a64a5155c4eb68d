"""The result files: a CSV with a row for every run, and beside it what each run was made with.

Knows rows and files. Does not know how a row is measured.

`NAME.csv` has exactly the columns `COLUMNS`. `NAME.json` lists for each of its rows, in the same
order, the ratio that was asked for, the fingerprint of all settings that decide the row, the losses
over the run and the bytes by kind. Rows whose fingerprint is not today's are thrown away and
measured again. Both files are replaced whole after every run, so a benchmark may be killed at any
time.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.result_files import replace_text

COLUMNS = (
    "work", "seed", "method", "ratio", "bytes", "progress_kept", "cosine", "nmse",
    "encode_ms", "decode_ms",
)  # fmt: skip

Unit = tuple[str, int, str, int]
"""work, seed, method, ratio asked for (0: the method's own)."""


class ResultsError(ValueError):
    """A result file cannot be continued."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run: the numbers of the CSV's columns from `ratio` on, and the rest for the JSON."""

    numbers: tuple[float, ...]
    facts: Mapping[str, Any]
    fingerprint: str

    def value(self, column: str) -> float:
        """The number in a column of the CSV."""
        return self.numbers[COLUMNS.index(column) - 3]

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(rounds done, held-out loss)."""
        return [(int(done), float(loss)) for done, loss in self.facts["losses"]]


@dataclass
class Results:
    """All rows of one pair of files.

    Attributes:
        fingerprint: what today's settings make of a unit.
        thrown: how many rows `load` threw away.
    """

    path: Path
    fingerprint: Callable[[Unit], str]
    facts: Mapping[str, Any]
    rows: dict[Unit, Row] = field(default_factory=dict)
    thrown: int = 0

    @property
    def side(self) -> Path:
        """The file beside the CSV."""
        return self.path.with_suffix(".json")

    def load(self) -> None:
        """Take up the rows of an earlier run.

        Raises:
            ResultsError: the files are damaged or do not belong together.
        """
        if not self.path.exists() and not self.side.exists():
            return
        try:
            entries = json.loads(self.side.read_text(encoding="utf-8"))["rows"]
            lines = list(csv.reader(io.StringIO(self.path.read_text(encoding="utf-8"))))
            if tuple(lines[0]) != COLUMNS or len(lines) != len(entries) + 1:
                raise ValueError("other columns, or rows without an entry")
            for entry, cells in zip(entries, lines[1:], strict=True):
                self._take(entry, cells)
        except (OSError, KeyError, IndexError, TypeError, ValueError) as exc:
            raise ResultsError(
                f"{self.path} and {self.side.name} cannot be continued ({exc}); remove both, or "
                "choose another --out"
            ) from exc

    def _take(self, entry: dict[str, Any], cells: list[str]) -> None:
        work, seed, method = cells[0], int(cells[1]), cells[2]
        asked, fingerprint = int(entry.pop("asked")), str(entry.pop("fingerprint"))
        unit = (work, seed, method, asked)
        if fingerprint != self.fingerprint(unit):
            self.thrown += 1
            return
        self.rows[unit] = Row(tuple(map(float, cells[3:])), entry, fingerprint)

    def add(self, unit: Unit, numbers: tuple[float, ...], facts: Mapping[str, Any]) -> None:
        """Store a finished run."""
        self.rows[unit] = Row(numbers, facts, self.fingerprint(unit))
        self.save()

    def save(self) -> None:
        """Write both files, each whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        entries = []
        for unit in sorted(self.rows):
            row = self.rows[unit]
            writer.writerow([*unit[:3], *(f"{number:.6g}" for number in row.numbers)])
            entries.append({"asked": unit[3], "fingerprint": row.fingerprint, **row.facts})
        replace_text(self.path, text.getvalue())
        replace_text(self.side, json.dumps({**self.facts, "rows": entries}, indent=1) + "\n")


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of these settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
