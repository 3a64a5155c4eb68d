"""Letters that survive a power cut: the outbox, the inbox and half-received transfers.

Knows one SQLite file, the body files beside it and which messages were already accepted. Does not
know encryption, topics or what a message means; `outbox.py` holds the outgoing half.

Both sides use it. The coordinator keeps its own tables in the same file and joins them to one
transaction with `transaction()`, so "accepted and counted" is one step. Three rules hold:

- an item leaves the outbox only by `mark_done`, after the peer's signed Done, or by a stated rule;
- `accept` is durable before it returns, so a Done sent after it is never a lie;
- a message is accepted once: by its stream (a repeat is answered, not stored), by its sequence
  number (a window of 64 behind the highest, per sender and key), and by the unique (tenant, sender,
  task, kind). Several messages of one kind for one conversation therefore need envelope tasks of
  their own, such as `offer-3.0`, `offer-3.1` for the files of an offer.
"""

import sqlite3
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from edge_sdk.errors import RemoteProtocolError, StorageError
from edge_sdk.store.bodies import Bodies
from edge_sdk.store.body import Body, Posted, Slice
from edge_sdk.store.outbox import INLINE_BYTES, Outbox, OutboxRules
from edge_sdk.wire.header import Header
from edge_sdk.wire.replay import WINDOW, take

__all__ = [
    "INLINE_BYTES",
    "MAX_STORE_BYTES",
    "WINDOW",
    "Acceptance",
    "Body",
    "Letter",
    "Mailbox",
    "OutboxRules",
    "Partial",
    "Posted",
    "Slice",
]

MAX_STORE_BYTES = 4 * 1024**3
"""Default size at which a store takes no more letters; eight of the largest messages."""
PARTIAL_TTL_S = 7 * 24 * 3600.0
"""How long a half-received message is kept after its last piece; then its sender starts anew."""
PARTIAL_BYTES = 1024**3
"""How much half-received messages may take; beyond it the one that moved longest ago goes."""
ORPHAN_S = 3600.0
"""A body file that no row names after so long was left by a crash, not about to be committed."""

_TABLES = """
CREATE TABLE IF NOT EXISTS windows (
    tenant TEXT NOT NULL, sender TEXT NOT NULL, sender_key BLOB NOT NULL,
    highest INTEGER NOT NULL, seen BLOB NOT NULL, PRIMARY KEY (tenant, sender, sender_key));
CREATE TABLE IF NOT EXISTS letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, sender TEXT NOT NULL,
    sender_key BLOB NOT NULL, stream BLOB NOT NULL, task TEXT NOT NULL, kind TEXT NOT NULL,
    header BLOB NOT NULL, message BLOB, file TEXT NOT NULL DEFAULT '',
    UNIQUE (tenant, sender, task, kind), UNIQUE (tenant, sender, sender_key, stream));
CREATE INDEX IF NOT EXISTS letters_unread ON letters (id) WHERE message IS NOT NULL;
CREATE INDEX IF NOT EXISTS letters_files ON letters (file) WHERE file != '';
"""


class Acceptance(StrEnum):
    """What `accept` did; both are answered with a signed Done."""

    NEW = "new"
    ALREADY = "already"


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that was accepted; `message` are the bytes for `messages.decode`."""

    id: int
    sender: str
    kind: str
    task: str
    body: Body
    header: Header

    @property
    def message(self) -> bytes:
        """All the bytes.

        Raises:
            StorageError: they cannot be read.
        """
        return self.body.read()


@dataclass(frozen=True, slots=True)
class Partial:
    """A message that is being received into a file; nothing is promised before it is accepted."""

    name: str
    size: int
    _files: Bodies

    @property
    def held_bytes(self) -> int:
        """How far the file reaches; there may be holes in it."""
        return self._files.size(self.name)

    def write(self, offset: int, data: bytes) -> None:
        """Keep `data` at `offset`.

        Raises:
            StorageError: the disk refuses.
        """
        self._files.write(self.name, offset, data)

    def piece(self, offset: int, size: int) -> bytes:
        """Return what is at `offset`, zeros in a hole, fewer bytes at the end.

        Raises:
            StorageError: it cannot be read.
        """
        return self._files.read(self.name, offset, size) if self.held_bytes else b""

    def read(self) -> bytes:
        """Return all of it.

        Raises:
            StorageError: it cannot be read.
        """
        return self.piece(0, self.size)


class Mailbox(Outbox):
    """A durable mailbox in one SQLite file and a folder of body files, safe to share by threads.

    Raises:
        StorageError: the file cannot be opened or is damaged. So does every method when the disk
            is full or the store has reached `max_bytes`; nothing of that call is kept then, and
            the store works again once there is room.
    """

    def __init__(
        self,
        path: Path | str | sqlite3.Connection,
        *,
        max_bytes: int = MAX_STORE_BYTES,
        outbox: OutboxRules | None = None,
        partial_bytes: int = PARTIAL_BYTES,
    ) -> None:
        super().__init__(path, max_bytes=max_bytes, rules=outbox or OutboxRules())
        self._partial_bytes = partial_bytes
        self.create(_TABLES)

    # --- half-received transfers --------------------------------------------------------------

    def partial(self, stream: bytes, digest: bytes, size: int) -> Partial | None:
        """Return where the message of the transfer `digest` (`Manifest.digest`) is received.

        None if this store has no files: then it is kept in memory. What was received of the same
        stream under another manifest is dropped: it cannot fit together.

        Raises:
            StorageError: there is no room for it, whatever else is dropped.
        """
        if self.bodies is None:
            return None
        name = f"in-{stream.hex()}-{digest.hex()[:32]}"
        with self.transaction():
            self._drop_partials(f"in-{stream.hex()}-", but=name)
            more = size - self.bodies.size(name)
            self._bound_partials(more, but=name)
            self.need_room(more)
        return Partial(name, size, self.bodies)

    def drop_partial(self, stream: bytes) -> None:
        """Forget what was received of a transfer that was refused."""
        with self.transaction():
            self._drop_partials(f"in-{stream.hex()}-")

    def tidy(self, now_s: float) -> None:
        """Remove partial transfers that nobody continues and files that a crash left behind.

        For the one process that works with this mailbox, not for those that look at it. `now_s` is
        the clock that the file system uses.
        """
        with self.transaction() as db:
            if self.bodies is None:
                return
            named = {
                name
                for (name,) in db.execute(
                    "SELECT file FROM bodies UNION ALL SELECT file FROM letters WHERE file != ''"
                )
            }
            for found in self.bodies.list():
                age_s = now_s - found.changed_s
                limit_s = PARTIAL_TTL_S if found.name.startswith("in-") else ORPHAN_S
                if found.name not in named and age_s > limit_s:
                    self.bodies.remove(found.name)

    def _bound_partials(self, more: int, *, but: str) -> None:
        assert self.bodies is not None
        named = self._letter_files()
        old = [
            found
            for found in self.bodies.list()
            if found.name.startswith("in-") and found.name not in named | {but}
        ]
        total = sum(found.size for found in old)
        while old and total + more > self._partial_bytes:
            gone = old.pop(0)
            total -= gone.size
            self.bodies.remove(gone.name)

    def _drop_partials(self, start: str, *, but: str = "") -> None:
        if self.bodies is None:
            return
        for found in self.bodies.list():
            if found.name.startswith(start) and found.name not in self._letter_files() | {but}:
                self.bodies.remove(found.name)

    def _letter_files(self) -> set[str]:
        with self.transaction() as db:
            return {name for (name,) in db.execute("SELECT file FROM letters WHERE file != ''")}

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

    def accept(self, header: Header, message: bytes | Partial) -> Acceptance:
        """Take an opened message in, once, durably; what was stored of its transfer goes.

        A message in a file must be there as a whole; it is on the disk before the letter is.

        Raises:
            RemoteProtocolError: a replay, or a second message of this kind for this task.
        """
        with self.transaction() as db:
            if self.accepted(header):
                return Acceptance.ALREADY
            self._pass_window(db, header)
            key = (header.tenant, header.sender, header.task, header.kind)
            known = (
                "SELECT stream FROM letters"
                " WHERE tenant = ? AND sender = ? AND task = ? AND kind = ?"
            )
            first = db.execute(known, key).fetchone()
            if first == (header.stream,):
                return Acceptance.ALREADY  # the same, signed anew: its sender has a new key
            if first:
                raise RemoteProtocolError(
                    f"a second {header.kind} from {header.sender} for task {header.task}; "
                    "the first one stands"
                )
            inline, file = self._body_of(message)
            db.execute(
                "INSERT INTO letters (tenant, sender, task, kind, sender_key, stream, header,"
                " message, file) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*key, header.sender_key, header.stream, header.encode(), inline, file),
            )
        return Acceptance.NEW

    def _body_of(self, message: bytes | Partial) -> tuple[bytes, str]:
        if not isinstance(message, Partial):
            self.need_room(len(message))
            return message, ""
        if message.held_bytes != message.size:
            raise StorageError(f"{message.name} has {message.held_bytes} of {message.size} bytes")
        assert self.bodies is not None
        if message.size <= INLINE_BYTES:
            self.afterwards(self.bodies.remover(message.name))
            return message.read(), ""
        self.bodies.sync([message.name])
        return b"", message.name

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

    def unread(self, *, after: int = 0) -> list[Letter]:
        """Return the accepted messages that nobody has dealt with, oldest first.

        Those with an id above `after` only: letters may stay unread for long. Large ones are not
        read from their files before somebody asks for `message`.
        """
        with self.transaction() as db:
            rows = db.execute(
                "SELECT id, sender, kind, task, message, file, header FROM letters"
                " WHERE message IS NOT NULL AND id > ? ORDER BY id",
                (after,),
            ).fetchall()
        return [
            Letter(letter, sender, kind, task, self._letter_body(message, file), decoded)
            for letter, sender, kind, task, message, file, header in rows
            for decoded in [Header.decode(header)]
        ]

    def _letter_body(self, message: bytes, file: str) -> Body:
        if not file or self.bodies is None:
            return Body(message, len(message))
        return Body(b"", self.bodies.size(file), self.bodies, file)

    def mark_read(self, id: int) -> None:  # noqa: A002 - the letter's id, as Letter calls it
        """Forget a letter's bytes; that it was accepted is remembered."""
        with self.transaction() as db:
            row = db.execute("SELECT file FROM letters WHERE id = ?", (id,)).fetchone()
            db.execute("UPDATE letters SET message = NULL, file = '' WHERE id = ?", (id,))
            if row and row[0] and self.bodies is not None:
                self.afterwards(self.bodies.remover(row[0]))
