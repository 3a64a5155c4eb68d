"""The device's own examples: labelled text that is stored here, trained on here, and never sent.

Knows files of examples and a bounded store of them. Does not know models, messages or any link:
no message of the vocabulary can carry an `Example`.
"""

import hashlib
import json
import lzma
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from msgspec import Struct

from edge_sdk.errors import DataError, StorageError

MAX_LINE_BYTES = 1 << 20
"""Longest line of an example file: a request is far shorter, an archive named by mistake is not."""
MAX_TEXT_CHARS = 65_536
"""Longest text kept: what one message of the vocabulary may hold, so synthetic text fits too."""


class Example(Struct, frozen=True):
    """One labelled text."""

    text: str
    label: str


def read_examples(
    path: str | Path, *, text_column: str = "text", label_column: str = "label"
) -> list[Example]:
    """Return the examples of a `.jsonl` or `.jsonl.xz` file, one JSON object a line.

    Raises:
        DataError: missing or empty file, a line that is not UTF-8 (with its byte offset), not an
            object, or lacks a column.
    """
    path = Path(path)
    examples = [
        _example(line, where=f"{path}, line {number}", columns=(text_column, label_column))
        for number, line in _lines(path)
    ]
    if not examples:
        raise DataError(f"{path} holds no examples; give one JSON object per line")
    return examples


class ExampleStore:
    """A durable, bounded set of examples, split once and for all into training and held-out.

    The split follows a hash of the text: it survives restarts and re-reading, and the same text is
    never on both sides. Usable from several threads.
    """

    def __init__(self, path: str | Path, *, held_out: float = 0.2, limit: int = 20_000) -> None:
        """Open or make the SQLite file `path`; `held_out` is a share in [0, 1).

        Raises:
            StorageError: the file cannot be opened or is damaged.
        """
        self._path = Path(path)
        self._held_out = held_out
        self._limit = limit
        self._lock = threading.Lock()
        with self._guarded():
            self._rows = sqlite3.connect(self._path, check_same_thread=False)
            os.chmod(self._path, 0o600)
            self._rows.execute("PRAGMA journal_mode=WAL")
            self._rows.execute("PRAGMA synchronous=FULL")
            self._rows.execute(
                "CREATE TABLE IF NOT EXISTS example ("
                "number INTEGER PRIMARY KEY, text TEXT NOT NULL, label TEXT NOT NULL, "
                "share REAL NOT NULL, UNIQUE (text, label))"
            )
            self._rows.commit()

    def add(self, examples: Iterable[Example]) -> int:
        """Keep `examples`, all or none; return how many were new. The oldest go over the limit.

        Raises:
            DataError: an empty or overlong text, or an empty label.
            StorageError: the write failed; nothing was kept.
        """
        rows = [(item.text, item.label, _share(item.text)) for item in _sound(examples)]
        with self._lock, self._guarded(), self._rows:
            before = self._rows.total_changes
            self._rows.executemany(
                "INSERT OR IGNORE INTO example (text, label, share) VALUES (?, ?, ?)", rows
            )
            new = self._rows.total_changes - before
            self._rows.execute(
                "DELETE FROM example WHERE number <= "
                "(SELECT number FROM example ORDER BY number DESC LIMIT 1 OFFSET ?)",
                (self._limit,),
            )
        return new

    def training(self) -> list[Example]:
        """Return the examples to train on, oldest first."""
        return self._select("share >= ?")

    def held_out(self) -> list[Example]:
        """Return the examples kept from training, oldest first."""
        return self._select("share < ?")

    def __len__(self) -> int:
        with self._lock, self._guarded():
            return int(self._rows.execute("SELECT count(*) FROM example").fetchone()[0])

    def close(self) -> None:
        """Close the file; what was added stays."""
        self._rows.close()

    def _select(self, condition: str) -> list[Example]:
        query = f"SELECT text, label FROM example WHERE {condition} ORDER BY number"
        with self._lock, self._guarded():
            return [Example(*row) for row in self._rows.execute(query, (self._held_out,))]

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            raise StorageError(
                f"the example store {self._path} refused: {exc}; free space or restore the file"
            ) from exc


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _sound(examples: Iterable[Example]) -> Iterator[Example]:
    for position, item in enumerate(examples):
        if not item.text.strip() or not item.label.strip():
            raise DataError(f"example {position} has an empty text or label")
        if len(item.text) > MAX_TEXT_CHARS:
            raise DataError(
                f"example {position} has {len(item.text)} characters; at most {MAX_TEXT_CHARS}"
            )
        try:
            item.text.encode()
            item.label.encode()
        except UnicodeEncodeError as exc:  # a lone surrogate, as JSON's escapes can write
            raise DataError(f"example {position} holds a half character: {exc.reason}") from exc
        yield item


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered non-blank lines; bytes are decoded here so that a complaint can name the offset."""
    offset = 0
    try:
        with _opened(path) as file:
            number = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(data) > MAX_LINE_BYTES:
                    raise DataError(f"{path}, line {number} is over {MAX_LINE_BYTES} bytes")
                try:
                    line = data.decode()
                except UnicodeDecodeError as exc:
                    raise DataError(
                        f"{path}, line {number} is not UTF-8: byte {offset + exc.start} of the "
                        f"file is 0x{data[exc.start]:02x}; convert the file to UTF-8"
                    ) from exc
                offset += len(data)
                if line.strip():
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError) as exc:
        raise DataError(f"cannot read the examples in {path}: {exc}") from exc


def _opened(path: Path) -> IO[bytes]:
    return lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb")


def _example(line: str, *, where: str, columns: tuple[str, str]) -> Example:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise DataError(f"{where} is not JSON: {exc}") from exc
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object")
    values = []
    for column in columns:
        if column not in row:
            raise DataError(f"{where} has no column {column!r}; it has {', '.join(sorted(row))}")
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(f"{where}: column {column!r} is not a non-empty text")
        values.append(row[column])
    return Example(*values)
