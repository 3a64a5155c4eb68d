"""Letters that survive a power cut: the outbox, the inbox and half-received transfers.

Knows one SQLite file, sequence numbers and which messages were already accepted. Does not know
encryption, topics or what a message means.

Both sides use it. The coordinator keeps its own tables in the same file and joins them to one
transaction with `transaction()`, so "accepted and counted" is one step. Three rules hold:

- an item leaves the outbox only by `mark_done`, after the peer's signed Done;
- `accept` is durable before it returns, so a Done sent after it is never a lie;
- a message is accepted once: by its stream (a repeat is answered, not stored), by its sequence
  number (a window of 64 behind the highest, per sender and key), and by the unique (tenant, sender,
  task, kind). Several messages of one kind for one conversation therefore need envelope tasks of
  their own, such as `offer-3.0`, `offer-3.1` for the files of an offer.
"""

import hashlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError
from edge_sdk.store.database import Database
from edge_sdk.wire.replay import WINDOW, take
from edge_sdk.wire.seal import Header, new_stream

MAX_STORE_BYTES = 4 * 1024**3
"""Default size at which a store takes no more letters; eight of the largest messages."""

_TABLES = """
CREATE TABLE IF NOT EXISTS bodies (
    hash BLOB PRIMARY KEY, message BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
    stream BLOB PRIMARY KEY, peer TEXT NOT NULL, kind TEXT NOT NULL, task TEXT NOT NULL,
    sequence INTEGER NOT NULL, body BLOB NOT NULL REFERENCES bodies (hash),
    manifest BLOB NOT NULL DEFAULT x'', file_key BLOB NOT NULL DEFAULT x'',
    parked TEXT NOT NULL DEFAULT '', UNIQUE (peer, sequence));
CREATE INDEX IF NOT EXISTS outbox_body ON outbox (body);
CREATE TABLE IF NOT EXISTS sequences (
    peer TEXT PRIMARY KEY, last INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS partial (
    stream BLOB NOT NULL, position INTEGER NOT NULL, digest BLOB NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (stream, position));
CREATE TABLE IF NOT EXISTS windows (
    tenant TEXT NOT NULL, sender TEXT NOT NULL, sender_key BLOB NOT NULL,
    highest INTEGER NOT NULL, seen BLOB NOT NULL, PRIMARY KEY (tenant, sender, sender_key));
CREATE TABLE IF NOT EXISTS letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, sender TEXT NOT NULL,
    sender_key BLOB NOT NULL, stream BLOB NOT NULL, task TEXT NOT NULL, kind TEXT NOT NULL,
    header BLOB NOT NULL, message BLOB,
    UNIQUE (tenant, sender, task, kind), UNIQUE (tenant, sender, sender_key, stream));
CREATE INDEX IF NOT EXISTS letters_unread ON letters (id) WHERE message IS NOT NULL;
"""


class Acceptance(StrEnum):
    """What `accept` did; both are answered with a signed Done."""

    NEW = "new"
    ALREADY = "already"


@dataclass(frozen=True, slots=True)
class Posted:
    """A message in the outbox. `manifest` and `file_key` are empty until `keep_seal`.

    `parked` says in one sentence why it will not be sent; it is empty while it waits.
    """

    stream: bytes
    to: str
    kind: str
    task: str
    sequence: int
    message: bytes
    manifest: bytes
    file_key: bytes
    parked: str


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that was accepted; `message` are the bytes for `messages.decode`."""

    id: int
    sender: str
    kind: str
    task: str
    message: bytes
    header: Header


class Mailbox(Database):
    """A durable mailbox in one SQLite file, safe to share by threads.

    Raises:
        StorageError: the file cannot be opened or is damaged. So does every method when the disk
            is full or the store has reached `max_bytes`; nothing of that call is kept then, and
            the store works again once there is room.
    """

    def __init__(
        self, path: Path | str | sqlite3.Connection, *, max_bytes: int = MAX_STORE_BYTES
    ) -> None:
        super().__init__(path, max_bytes=max_bytes)
        self.create(_TABLES)

    # --- outbox -------------------------------------------------------------------------------

    def put(self, to: str, kind: str, task: str, message: bytes) -> bytes:
        """Store `message` for the peer `to`, durably, and return its new stream id.

        One message to many peers is stored once.
        """
        stream = new_stream()
        digest = hashlib.sha256(message).digest()
        with self.transaction() as db:
            self.need_room(len(message))
            db.execute("INSERT OR IGNORE INTO bodies VALUES (?, ?)", (digest, message))
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
            row = db.execute(
                "SELECT stream, peer, kind, task, sequence, message, manifest, file_key, parked"
                " FROM outbox JOIN bodies ON body = hash WHERE stream = ?",
                (stream,),
            ).fetchone()
        return Posted(*row) if row else None

    def keep_seal(self, stream: bytes, manifest: bytes, file_key: bytes) -> None:
        """Remember how an item was sealed, so that a resend is the same stream of bytes.

        `seal.reseal(message, manifest, file_key)` makes the chunks again, which is quicker than
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

    def mark_done(self, stream: bytes) -> bool:
        """Forget an item: its signed Done arrived. False when it was not there."""
        with self.transaction() as db:
            row = db.execute(
                "DELETE FROM outbox WHERE stream = ? RETURNING body", (stream,)
            ).fetchone()
            if row:
                db.execute(
                    "DELETE FROM bodies WHERE hash = ?"
                    " AND NOT EXISTS (SELECT 1 FROM outbox WHERE body = hash)",
                    row,
                )
        return row is not None

    def park(self, stream: bytes, reason: str) -> None:
        """Set an item aside, with the reason: it is kept but no longer sent."""
        with self.transaction() as db:
            db.execute("UPDATE outbox SET parked = ? WHERE stream = ?", (reason or "-", stream))

    def parked(self) -> list[Posted]:
        """Return the items set aside, oldest first, without their messages."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT stream, peer, kind, task, sequence, x'', manifest, file_key, parked"
                " FROM outbox WHERE parked != '' ORDER BY rowid"
            ).fetchall()
        return [Posted(*row) for row in rows]

    # --- half-received transfers --------------------------------------------------------------

    def keep_chunks(self, stream: bytes, digest: bytes, chunks: Mapping[int, bytes]) -> None:
        """Store chunks of the transfer whose `Manifest.digest` is `digest`.

        Chunks of the same stream under another manifest are dropped: they cannot fit together.
        """
        with self.transaction() as db:
            self.need_room(sum(map(len, chunks.values())))
            db.execute("DELETE FROM partial WHERE stream = ? AND digest != ?", (stream, digest))
            db.executemany(
                "INSERT OR IGNORE INTO partial VALUES (?, ?, ?, ?)",
                [(stream, index, digest, data) for index, data in chunks.items()],
            )

    def held(self, stream: bytes, digest: bytes) -> frozenset[int]:
        """Return the indices of the chunks stored so far."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT position FROM partial WHERE stream = ? AND digest = ?", (stream, digest)
            ).fetchall()
        return frozenset(index for (index,) in rows)

    def chunks(self, stream: bytes, digest: bytes) -> dict[int, bytes]:
        """Return the chunks stored so far, by index."""
        with self.transaction() as db:
            return dict(
                db.execute(
                    "SELECT position, data FROM partial WHERE stream = ? AND digest = ?",
                    (stream, digest),
                ).fetchall()
            )

    def drop_chunks(self, stream: bytes) -> None:
        """Forget what was stored of a transfer."""
        with self.transaction() as db:
            db.execute("DELETE FROM partial WHERE stream = ?", (stream,))

    # --- inbox --------------------------------------------------------------------------------

    def accepted(self, header: Header) -> bool:
        """Return whether this very stream was accepted before, so that its Done is sent again."""
        with self.transaction() as db:
            row = db.execute(
                "SELECT 1 FROM letters"
                " WHERE tenant = ? AND sender = ? AND sender_key = ? AND stream = ?",
                (header.tenant, header.sender, header.sender_key, header.stream),
            ).fetchone()
        return row is not None

    def accept(self, header: Header, message: bytes) -> Acceptance:
        """Take an opened message in, once, durably; what was stored of its transfer goes.

        Raises:
            RemoteProtocolError: a replay, or a second message of this kind for this task.
        """
        with self.transaction() as db:
            if self.accepted(header):
                self.drop_chunks(header.stream)
                return Acceptance.ALREADY
            self.drop_chunks(header.stream)
            self.need_room(len(message))
            self._pass_window(db, header)
            key = (header.tenant, header.sender, header.task, header.kind)
            known = (
                "SELECT 1 FROM letters WHERE tenant = ? AND sender = ? AND task = ? AND kind = ?"
            )
            if db.execute(known, key).fetchone():
                raise RemoteProtocolError(
                    f"a second {header.kind} from {header.sender} for task {header.task}; "
                    "the first one stands"
                )
            db.execute(
                "INSERT INTO letters (tenant, sender, task, kind, sender_key, stream, header,"
                " message) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*key, header.sender_key, header.stream, header.encode(), message),
            )
        return Acceptance.NEW

    @staticmethod
    def _pass_window(db: sqlite3.Connection, header: Header) -> None:
        # A new key starts a new window, so a device that enrols again may count from 1 again.
        owner = (header.tenant, header.sender, header.sender_key)
        row = db.execute(
            "SELECT highest, seen FROM windows WHERE tenant = ? AND sender = ? AND sender_key = ?",
            owner,
        ).fetchone()
        highest, seen = (row[0], int.from_bytes(row[1], "big")) if row else (0, 0)
        highest, seen = take(highest, seen, header.sequence)
        db.execute(
            "INSERT OR REPLACE INTO windows VALUES (?, ?, ?, ?, ?)",
            (*owner, highest, seen.to_bytes(WINDOW // 8, "big")),
        )

    def unread(self) -> list[Letter]:
        """Return the accepted messages that nobody has dealt with, oldest first."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT id, sender, kind, task, message, header FROM letters"
                " WHERE message IS NOT NULL ORDER BY id"
            ).fetchall()
        return [
            Letter(letter, sender, kind, task, message, Header.decode(header))
            for letter, sender, kind, task, message, header in rows
        ]

    def mark_read(self, id: int) -> None:  # noqa: A002 - the letter's id, as Letter calls it
        """Forget a letter's bytes; that it was accepted is remembered."""
        with self.transaction() as db:
            db.execute("UPDATE letters SET message = NULL WHERE id = ?", (id,))
