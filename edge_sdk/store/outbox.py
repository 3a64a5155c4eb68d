"""The outbox: messages that wait until their receiver has confirmed them, and where they are kept.

Knows bodies (rows, own files, slices of files of others), sequence numbers, the cap and what is
given up. Does not know encryption, topics, clocks or what a message means.

An item leaves only by `mark_done`, after the peer's signed Done, or by a rule that says so: what is
dropped or too old stays listed among the parked, with its reason, until somebody has looked.
"""

import hashlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_sdk.errors import LocalProtocolError, StorageError
from edge_sdk.store.bodies import Bodies
from edge_sdk.store.body import Body, Posted, Slice
from edge_sdk.store.database import Database
from edge_sdk.wire.replay import WINDOW
from edge_sdk.wire.seal import new_stream

INLINE_BYTES = 512 * 1024
"""Bodies up to this size are rows: one sync for a whole group. Larger ones are files: SQLite would
write them twice, to its log and to its file."""
MAX_PARKED = 1000
"""Items set aside that are remembered; the oldest are forgotten first."""

_TABLES = """
CREATE TABLE IF NOT EXISTS bodies (
    hash BLOB PRIMARY KEY, message BLOB NOT NULL, file TEXT NOT NULL DEFAULT '',
    offset INTEGER NOT NULL DEFAULT 0, size INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
    stream BLOB PRIMARY KEY, peer TEXT NOT NULL, kind TEXT NOT NULL, task TEXT NOT NULL,
    sequence INTEGER NOT NULL, body BLOB REFERENCES bodies (hash),
    manifest BLOB NOT NULL DEFAULT x'', file_key BLOB NOT NULL DEFAULT x'',
    parked TEXT NOT NULL DEFAULT '', waited_s REAL NOT NULL DEFAULT 0, UNIQUE (peer, sequence));
CREATE INDEX IF NOT EXISTS outbox_body ON outbox (body);
CREATE TABLE IF NOT EXISTS sequences (
    peer TEXT PRIMARY KEY, last INTEGER NOT NULL);
"""
_ITEM = (
    "SELECT stream, peer, kind, task, sequence, manifest, file_key, parked,"
    " message, file, offset, size FROM outbox LEFT JOIN bodies ON body = hash"
)


@dataclass(frozen=True, slots=True)
class OutboxRules:
    """What the outbox takes: at most `max_bytes` of bodies, each for at most `ttl_s` at work.

    When it is full, "refuse" raises StorageError, and "oldest" gives up the oldest waiting messages
    of the same kind to the same peer, of which only the newest is worth anything.
    """

    max_bytes: int = 2 * 1024**3
    ttl_s: float = 60 * 24 * 3600.0
    when_full: Literal["refuse", "oldest"] = "refuse"


class Outbox(Database):
    """The outgoing half of a mailbox; see `Mailbox` for how it is opened and what it raises."""

    def __init__(
        self, path: Path | str | sqlite3.Connection, *, max_bytes: int, rules: OutboxRules
    ) -> None:
        super().__init__(path, max_bytes=max_bytes)
        self.rules = rules
        self.bodies = Bodies(Path(f"{self.path}-bodies")) if self.path != ":memory:" else None
        self.create(_TABLES)

    def put(
        self, to: str, kind: str, task: str, message: bytes, rest: Slice | None = None
    ) -> bytes:
        """Store a message for the peer `to`, durably, and return its new stream id.

        Its bytes are `message`, then `rest`, which stays where it is. One message to many peers is
        stored once.

        Raises:
            StorageError: the outbox is full (`rules`), or the disk is.
        """
        stream = new_stream()
        with self.transaction() as db:
            digest = self._keep_body(db, to, kind, message, rest)
            (sequence,) = db.execute(
                "INSERT INTO sequences VALUES (?, 1)"
                " ON CONFLICT (peer) DO UPDATE SET last = last + 1 RETURNING last",
                (to,),
            ).fetchone()
            db.execute(
                "INSERT INTO outbox (stream, peer, kind, task, sequence, body)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (stream, to, kind, task, sequence, digest),
            )
        return stream

    def posted(self, stream: bytes) -> Posted | None:
        """Return the outbox item, or None when there is none (it was done)."""
        with self.transaction() as db:
            row = db.execute(f"{_ITEM} WHERE stream = ?", (stream,)).fetchone()
        return self._item(row) if row else None

    def keep_seal(self, stream: bytes, manifest: bytes, file_key: bytes) -> None:
        """Remember how an item was sealed, so that a resend is the same stream of bytes.

        `seal.Sealer.again(manifest, file_key)` makes the chunks again, which is quicker than
        storing a second copy of them.

        Raises:
            LocalProtocolError: no such item.
        """
        with self.transaction() as db:
            changed = db.execute(
                "UPDATE outbox SET manifest = ?, file_key = ? WHERE stream = ?",
                (manifest, file_key, stream),
            ).rowcount
        if not changed:
            raise LocalProtocolError(f"stream {stream.hex()} is not in the outbox")

    def pending(self, to: str | None = None) -> list[bytes]:
        """Return the streams to send now, oldest first; parked ones are not listed.

        Per peer only those less than WINDOW numbers after its oldest are listed, so that the
        peer's replay window never moves past one that still waits.
        """
        with self.transaction() as db:
            rows = db.execute(
                "SELECT stream FROM (SELECT rowid AS place, stream, peer, sequence,"
                " min(sequence) OVER (PARTITION BY peer) AS oldest FROM outbox WHERE parked = '')"
                " WHERE sequence < oldest + ? AND (? IS NULL OR peer = ?) ORDER BY place",
                (WINDOW, to, to),
            ).fetchall()
        return [stream for (stream,) in rows]

    def waiting(self) -> list[bytes]:
        """Return every stream that is neither done nor parked, oldest first: also later ones."""
        with self.transaction() as db:
            rows = db.execute("SELECT stream FROM outbox WHERE parked = '' ORDER BY rowid")
            return [stream for (stream,) in rows]

    def mark_done(self, stream: bytes) -> bool:
        """Forget an item: its signed Done arrived. False when it was not there."""
        with self.transaction() as db:
            row = db.execute(
                "DELETE FROM outbox WHERE stream = ? RETURNING body", (stream,)
            ).fetchone()
            if row:
                self._drop_body(db, row[0])
        return row is not None

    # --- set aside ----------------------------------------------------------------------------

    def park(self, stream: bytes, reason: str) -> None:
        """Set an item aside, with the reason: it is kept but no longer sent."""
        with self.transaction() as db:
            db.execute("UPDATE outbox SET parked = ? WHERE stream = ?", (reason or "-", stream))
            old = db.execute(
                "SELECT stream FROM outbox WHERE parked != '' ORDER BY rowid DESC"
                " LIMIT -1 OFFSET ?",
                (MAX_PARKED,),
            ).fetchall()
            for (forgotten,) in old:
                self.mark_done(forgotten)

    def parked(self) -> list[Posted]:
        """Return the items set aside, oldest first."""
        with self.transaction() as db:
            rows = db.execute(f"{_ITEM} WHERE parked != '' ORDER BY outbox.rowid").fetchall()
        return [self._item(row) for row in rows]

    def wait_passes(self, seconds: float) -> list[bytes]:
        """Note that `seconds` went by at work; park and return what has waited too long.

        Time at work, not by a calendar: a device whose clock jumps ten years gives nothing up.
        """
        late: list[bytes] = []
        with self.transaction() as db:
            db.execute("UPDATE outbox SET waited_s = waited_s + ? WHERE parked = ''", (seconds,))
            rows = db.execute(
                "SELECT stream FROM outbox WHERE parked = '' AND waited_s > ?", (self.rules.ttl_s,)
            ).fetchall()
            for (stream,) in rows:
                days = self.rules.ttl_s / 86_400
                self._give_up(db, stream, f"not confirmed within {days:.3g} days at work")
                late.append(stream)
        return late

    # --- bodies -------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Return how much of the store is in use, body files included."""
        files = self.bodies.used_bytes if self.bodies is not None else 0
        return super().used_bytes() + files

    def _keep_body(
        self, db: sqlite3.Connection, to: str, kind: str, message: bytes, rest: Slice | None
    ) -> bytes:
        if rest is not None:
            place = f"{rest.path.absolute()}\0{rest.offset}\0{rest.size}\0".encode()
            digest = hashlib.sha256(b"slice" + place + message).digest()
        else:
            digest = hashlib.sha256(message).digest()
        if db.execute("SELECT 1 FROM bodies WHERE hash = ?", (digest,)).fetchone():
            return digest
        self._make_room(db, to, kind, len(message))
        if rest is not None:
            row = (message, str(rest.path.absolute()), rest.offset, len(message) + rest.size)
        elif self.bodies is None or len(message) <= INLINE_BYTES:
            row = (message, "", 0, len(message))
        else:
            name = f"out-{new_stream().hex()}"  # never used twice, so a late removal hits no other
            self.bodies.put(name, [message])
            self.afterwards(_nothing, undo=self.bodies.remover(name))
            row = (b"", name, 0, len(message))
        db.execute("INSERT INTO bodies VALUES (?, ?, ?, ?, ?)", (digest, *row))
        return digest

    def _make_room(self, db: sqlite3.Connection, to: str, kind: str, size: int) -> None:
        self.need_room(size)
        while (used := self._outbox_bytes(db)) + size > self.rules.max_bytes:
            oldest = db.execute(
                "SELECT stream FROM outbox WHERE peer = ? AND kind = ? AND parked = ''"
                " ORDER BY rowid LIMIT 1",
                (to, kind),
            ).fetchone()
            if self.rules.when_full == "refuse" or oldest is None:
                raise StorageError(
                    f"the outbox holds {used} bytes and {size} more are over its cap of "
                    f"{self.rules.max_bytes}; wait until messages are delivered, or raise the cap"
                )
            self._give_up(db, oldest[0], f"given up for a newer {kind}: the outbox was full")

    @staticmethod
    def _outbox_bytes(db: sqlite3.Connection) -> int:
        # A slice of somebody else's file takes no room here.
        (total,) = db.execute(
            "SELECT coalesce(sum(CASE WHEN file LIKE '/%' THEN length(message) ELSE size END), 0)"
            " FROM bodies"
        ).fetchone()
        return int(total)

    def _give_up(self, db: sqlite3.Connection, stream: bytes, reason: str) -> None:
        (body,) = db.execute("SELECT body FROM outbox WHERE stream = ?", (stream,)).fetchone()
        db.execute("UPDATE outbox SET body = NULL WHERE stream = ?", (stream,))
        self._drop_body(db, body)
        self.park(stream, reason)

    def _drop_body(self, db: sqlite3.Connection, digest: bytes | None) -> None:
        row = db.execute(
            "DELETE FROM bodies WHERE hash = ?"
            " AND NOT EXISTS (SELECT 1 FROM outbox WHERE body = hash) RETURNING file",
            (digest,),
        ).fetchone()
        if row and row[0] and not row[0].startswith("/") and self.bodies is not None:
            self.afterwards(self.bodies.remover(row[0]))

    def _item(self, row: tuple[object, ...]) -> Posted:
        *item, message, file, offset, size = row
        body = Body(message or b"", size or 0, self.bodies, file or "", offset or 0)  # type: ignore[arg-type]
        return Posted(*item, body)  # type: ignore[arg-type,call-arg]


def _nothing() -> None:
    return None
