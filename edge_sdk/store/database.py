"""One SQLite file that survives a power cut, with transactions that threads and rooms can share.

Knows how to open the file safely, how transactions nest and how a full disk is reported. Does not
know any table.
"""

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from edge_sdk.errors import StorageError

logger = logging.getLogger(__name__)

BUSY_MS = 10_000
"""How long to wait for another process that reads the file, such as `symbiont status`."""
JOURNAL_BYTES = 16 * 1024**2
"""What the write-ahead log is cut back to after a large transaction."""


CHECKPOINT_PAGES = 256
"""After 1 MiB the log is moved into the file, so that a small disk does not hold much twice."""


class Database:
    """A SQLite file in WAL mode with synchronous FULL: what was committed is on the disk.

    One lock and one connection: a transaction of one thread makes the others wait.

    Raises:
        StorageError: the file cannot be opened, is damaged, or is not a database.
    """

    def __init__(self, path: Path | str | sqlite3.Connection, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        self._depth = 0
        self._afterwards: list[Callable[[], None]] = []
        self._undo: list[Callable[[], None]] = []
        given = isinstance(path, sqlite3.Connection)
        with self._named_errors("the store" if given else path):
            self._db = path if isinstance(path, sqlite3.Connection) else _open(Path(path))
            try:
                self.path = _prepare(self._db)
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Everything committed is safe without this too."""
        with self._lock:
            self._db.close()

    def create(self, tables: str) -> None:
        """Run `CREATE TABLE IF NOT EXISTS` statements, separated by semicolons, as one step."""
        with self.transaction() as db:
            for statement in filter(str.strip, tables.split(";")):
                db.execute(statement)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Do all of the block or nothing; durable when the outermost block ends.

        Blocks nest: an inner one that raises undoes its own part, and the outer one may go on.

        Raises:
            StorageError: the disk is full or the file damaged; nothing of the outermost block is
                kept then, and the store works again once there is room.
        """
        with self._lock, self._named_errors(self.path):
            depth = self._depth
            self._db.execute("BEGIN IMMEDIATE" if depth == 0 else f"SAVEPOINT level_{depth}")
            self._depth += 1
            promised = len(self._afterwards), len(self._undo)
            try:
                yield self._db
                if not self._db.in_transaction:  # SQLite undid it all, and the block went on
                    raise sqlite3.OperationalError("the transaction was undone")
                self._db.execute("COMMIT" if depth == 0 else f"RELEASE level_{depth}")
            except BaseException:
                # A full disk may have undone everything already.
                if self._db.in_transaction:
                    if depth == 0:
                        self._db.execute("ROLLBACK")
                    else:
                        self._db.execute(f"ROLLBACK TO level_{depth}")
                        self._db.execute(f"RELEASE level_{depth}")
                del self._afterwards[promised[0] :]
                undo, self._undo[promised[1] :] = self._undo[promised[1] :], []
                _run(undo)
                raise
            finally:
                self._depth -= 1
            if depth == 0:
                actions, self._afterwards, self._undo = self._afterwards, [], []
                _run(actions)

    def afterwards(
        self, action: Callable[[], None], *, undo: Callable[[], None] | None = None
    ) -> None:
        """Within a transaction: do `action` once the outermost block is durable.

        `undo` is done instead if this block, or one around it, is undone. Neither may fail in a
        way that matters: a crash can come between the commit and the action.
        """
        self._afterwards.append(action)
        if undo is not None:
            self._undo.append(undo)

    def used_bytes(self) -> int:
        """Return how much of the file is in use, without what deleted rows left free."""
        with self.transaction() as db:
            pages, free, size = (
                db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count", "page_size")
            )
        return int((pages - free) * size)

    def need_room(self, size_bytes: int) -> None:
        """Check that `size_bytes` more still fit under `max_bytes`.

        Raises:
            StorageError: they do not.
        """
        used = self.used_bytes()
        if used + size_bytes > self.max_bytes:
            raise StorageError(
                f"{self.path} holds {used} bytes and {size_bytes} more are over its limit of "
                f"{self.max_bytes}; wait until waiting messages are delivered, or raise the limit"
            )

    @contextmanager
    def _named_errors(self, path: object) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as exc:
            if isinstance(exc, sqlite3.IntegrityError | sqlite3.ProgrammingError):
                raise  # the caller's own mistake, not the disk's
            raise StorageError(f"{path}: {exc}; {_next_step(exc)}") from exc


def _run(actions: list[Callable[[], None]]) -> None:
    for action in actions:
        try:
            action()
        except OSError:
            logger.exception("tidying up after a transaction failed; the store itself is sound")


def _open(path: Path) -> sqlite3.Connection:
    # Private from its first byte: SQLite gives the log files the rights of the main one. A file
    # that is there is not opened here: closing any descriptor of it would drop the locks of a
    # connection that this process may have already, and the next process to close would then take
    # the log away from under it.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        pass
    except OSError as exc:
        raise StorageError(f"cannot open {path}: {exc}; check the folder and its rights") from exc
    return sqlite3.connect(path, check_same_thread=False)


def _prepare(db: sqlite3.Connection) -> str:
    # On a full disk an existing store must still open, so nothing here writes to one.
    db.isolation_level = None  # we write BEGIN ourselves
    db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    if db.execute("PRAGMA page_count").fetchone() == (0,):
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
    db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    db.execute("PRAGMA foreign_keys = ON")
    return db.execute("PRAGMA database_list").fetchone()[2] or ":memory:"


def _next_step(exc: sqlite3.DatabaseError) -> str:
    match getattr(exc, "sqlite_errorcode", 0) & 0xFF:  # without the extended part
        case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
            return "free space on that disk; nothing stored was lost"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return "the file is damaged: move it away and restore a copy, or start with a new one"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return "another process holds it: close that one and try again"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN:
            return "check the rights of the file and of its folder"
    return "check the disk and the file's rights"
