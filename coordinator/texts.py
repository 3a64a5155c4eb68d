"""Reads the operator's own texts: public ones to learn from, labelled ones to be judged by.

Knows .jsonl and .jsonl.xz. Does not know devices' data, which never come here.
"""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from edge_sdk.errors import DataError

MAX_LINE_CHARS = 1 << 20
"""One text of a megabyte is no request; the file was named by mistake."""


def read_texts(
    path: Path, *, text_column: str, label_column: str | None = None, most: int
) -> list[tuple[str, str]]:
    """Return up to `most` pairs (text, label); the label is "" without `label_column`.

    Raises:
        DataError: missing, not UTF-8, not JSON lines, or a column is absent; names the line.
    """
    rows: list[tuple[str, str]] = []
    for number, line in _lines(path):
        if len(rows) == most:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{path} line {number} is not JSON; one object a line") from exc
        rows.append(
            (
                _field(row, text_column, path, number),
                "" if label_column is None else _field(row, label_column, path, number),
            )
        )
    if not rows:
        raise DataError(f"{path} holds no texts; give a file with one JSON object a line")
    return rows


def _field(row: object, column: str, path: Path, number: int) -> str:
    value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise DataError(f"{path} line {number} has no text in column {column!r}")
    return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with (
            lzma.open(path, "rt", encoding="utf-8")
            if path.suffix == ".xz"
            else path.open(encoding="utf-8")
        ) as file:
            number = 0
            while line := file.readline(MAX_LINE_CHARS + 1):
                number += 1
                if len(line) > MAX_LINE_CHARS:
                    raise DataError(f"{path} line {number} is over {MAX_LINE_CHARS} characters")
                yield number, line
    except (OSError, lzma.LZMAError, EOFError) as exc:
        raise DataError(f"cannot read {path}: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text: byte {exc.start} is wrong") from exc
