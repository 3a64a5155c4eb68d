"""What did leave this device: durable lines, each chained to the one before by its hash.

Knows the outbox's items, the sizes of their fields and when sending began and ended. Does not know
links or seals, and never keeps a value of a field: only its name and its bytes.

Three rules hold, and `tests/test_store_ledger.py` kills the process to see that they do:

- `begin` is on the disk before the first byte of a message is handed to the link, so there is no
  message without a line; a resend after a restart, or under another key, has a line of its own;
- the line of the end is written in the transaction that takes the item out of the outbox;
- a line is never changed: its hash covers the one before it, and the last hash is kept apart.

Bytes on the wire are the frames handed to the broker, without MQTT's own headers. They are known
when a transfer ends or the device closes; those of a process that was killed amid one are not, and
the entry says so. Past MAX_LINES the older half becomes one sum per kind, whose digest is a line.

Not promised: whoever can write the file can also build the whole chain anew. Note `head` down
somewhere else to notice that too.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edge_sdk.errors import StorageError
from edge_sdk.store.mailbox import Body, Mailbox, Posted
from edge_sdk.wire.messages import AnyMessage, decode, encode
from edge_sdk.wire.seal import Header, peek_header

MAX_LINES = 20_000
"""About 6 MB; at a hundred messages a day the older half is half a year old."""

BEGUN, RESUMED, PAUSED, ACKNOWLEDGED, REFUSED, SUMMED = (
    "begun",
    "resumed",
    "paused",
    "acknowledged",
    "refused",
    "summed",
)
"""What a line says of its message; SUMMED is about older lines."""

_START = bytes(32)
_COLUMNS = (
    "line, what, local_s, trusted_s, stream, kind, task, recipient, key_id, plain_bytes,"
    " wire_bytes, fields, note, hash"
)
_TABLES = """
CREATE TABLE IF NOT EXISTS ledger (
    line INTEGER PRIMARY KEY, what TEXT NOT NULL, local_s INTEGER NOT NULL,
    trusted_s INTEGER NOT NULL, stream BLOB NOT NULL, kind TEXT NOT NULL, task TEXT NOT NULL,
    recipient TEXT NOT NULL, key_id TEXT NOT NULL, plain_bytes INTEGER NOT NULL,
    wire_bytes INTEGER NOT NULL, fields TEXT NOT NULL, note TEXT NOT NULL, hash BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS ledger_stream ON ledger (stream);
CREATE TABLE IF NOT EXISTS ledger_head (
    one INTEGER PRIMARY KEY CHECK (one = 1), line INTEGER NOT NULL, hash BLOB NOT NULL,
    past TEXT NOT NULL, anchor BLOB NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One message that left. Times are seconds since 1970, 0 for unknown; sizes are in bytes.

    Attributes:
        local_s: this device's clock. trusted_s: the coordinator's last signed time by then.
        plain_bytes: the message before sealing. wire_bytes: its frames, resends included.
        whole: whether `wire_bytes` covers every process that sent it.
        key: hexadecimal id of the receive key it was last sealed to.
        fields: name -> encoded bytes; never a value.
        state: "on its way", "acknowledged" or "refused"; note: why it was refused.
    """

    local_s: int
    trusted_s: int
    kind: str
    task: str
    stream: str
    to: str
    key: str
    plain_bytes: int
    wire_bytes: int
    whole: bool
    fields: dict[str, int]
    state: str
    note: str = ""


@dataclass(slots=True)
class _Open:
    item: Posted
    key_id: str
    wire_bytes: int = 0


@dataclass(slots=True)
class Ledger:
    """The lines in a mailbox's file; thread-safe as the mailbox is."""

    mailbox: Mailbox
    now: Callable[[], float]
    max_lines: int = MAX_LINES
    _open: dict[bytes, _Open] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mailbox.create(_TABLES)

    # --- called by the sender -----------------------------------------------------------------

    def begin(self, item: Posted, manifest: bytes) -> None:
        """Note, durably, that `item` is about to leave as `manifest` announces it.

        A second call for the same item and key changes nothing.

        Raises:
            StorageError: the disk refuses; the item must not be sent.
        """
        key_id = peek_header(manifest).recipient_key.hex()
        current = self._open.get(item.stream)
        if current is not None and current.key_id == key_id:
            return
        sizes = json.dumps(field_sizes(decode(item.message)))
        with self.mailbox.transaction() as db:
            known = db.execute("SELECT 1 FROM ledger WHERE stream = ?", (item.stream,)).fetchone()
            opened = _Open(item, key_id, current.wire_bytes if current else 0)
            self._append(RESUMED if known else BEGUN, opened, fields=sizes)
        self._open[item.stream] = opened

    def called(self, to: str, stream: bytes, message: AnyMessage, manifest: bytes) -> None:
        """Note, durably, that a call is about to leave; nobody confirms it, so it stays "begun".

        Raises:
            StorageError: the disk refuses; it must not be sent.
        """
        header, data = peek_header(manifest), encode(message)
        body = Body(data, len(data))
        item = Posted(
            stream, to, header.kind, header.task, header.sequence, manifest, b"", "", body
        )
        self._append(
            BEGUN,
            _Open(item, header.recipient_key.hex(), len(data)),
            fields=json.dumps(field_sizes(message)),
        )

    def count(self, stream: bytes, wire_bytes: int) -> None:
        """Add a frame's bytes that the link took."""
        current = self._open.get(stream)
        if current is not None:
            current.wire_bytes += wire_bytes

    def end(self, stream: bytes, *, refused: str = "") -> None:
        """Note how it ended; call this in the transaction that takes the item out of the outbox."""
        current = self._open.get(stream)
        if current is not None:
            self._append(REFUSED if refused else ACKNOWLEDGED, current, note=refused)

    def forget(self, stream: bytes) -> None:
        """Stop counting a stream whose end is stored."""
        self._open.pop(stream, None)

    def close(self) -> None:
        """Store the bytes counted so far of what is still on its way."""
        with self.mailbox.transaction():
            for current in self._open.values():
                self._append(PAUSED, current)
        self._open.clear()

    # --- for people ---------------------------------------------------------------------------

    def entries(self, *, since_s: float = 0.0) -> list[Entry]:
        """Return one entry per message whose first line is not older than `since_s`, oldest first.

        Compared is the coordinator's time where it is known, else this device's.
        """
        by_stream: dict[bytes, list[dict[str, Any]]] = {}
        for line in self._lines():
            if line["what"] != SUMMED:
                by_stream.setdefault(line["stream"], []).append(line)
        made = [_entry(lines) for lines in by_stream.values()]
        return [entry for entry in made if (entry.trusted_s or entry.local_s) >= since_s]

    def past(self) -> dict[str, Any]:
        """Return the sums of lines no longer kept: {"lines", "until_s", "kinds": {kind: {...}}}."""
        return self._head()[2]

    @property
    def head(self) -> str:
        """The number and hash of the last line, to be noted down elsewhere."""
        line, last, _, _ = self._head()
        return f"{line}:{last.hex()}"

    def verify(self) -> int:
        """Recompute the whole chain; return the number of lines kept.

        Raises:
            StorageError: a line was changed, removed or put in; names the first.
        """
        number, last, past, anchor = self._head()
        before = anchor
        expected = number - self._kept() + 1
        digest = ""
        for line in self._lines():
            if line["line"] != expected:
                raise StorageError(f"the ledger was altered: line {expected} is missing")
            if line["hash"] != _hash(before, line):
                raise StorageError(f"the ledger was altered: line {expected} does not fit its hash")
            before, expected = line["hash"], expected + 1
            digest = line["note"] if line["what"] == SUMMED else digest
        if expected != number + 1 or before != last:
            raise StorageError(f"the ledger was altered: it does not end with line {number}")
        if past and (past["lines"] != number - self._kept() or digest != _digest(past, anchor)):
            raise StorageError("the ledger was altered: the sums of its past do not fit")
        return self._kept()

    # --- lines --------------------------------------------------------------------------------

    def _append(self, what: str, current: _Open, *, fields: str = "", note: str = "") -> None:
        with self.mailbox.transaction() as db:
            number, last, past, anchor = self._head()
            item = current.item
            line: dict[str, Any] = {
                "line": number + 1,
                "what": what,
                "local_s": int(self.now()),
                "trusted_s": self._trusted_s(),
                "stream": item.stream,
                "kind": item.kind,
                "task": item.task,
                "recipient": item.to,
                "key_id": current.key_id,
                "plain_bytes": item.body.size,
                "wire_bytes": current.wire_bytes,
                "fields": fields,
                "note": note,
            }
            line["hash"] = _hash(last, line)
            db.execute(
                f"INSERT INTO ledger ({_COLUMNS}) VALUES ({', '.join('?' * len(line))})",
                tuple(line.values()),
            )
            self._keep_head(number + 1, line["hash"], past, anchor)
            if what != SUMMED and self._kept() > self.max_lines:
                self._sum_up()

    def _sum_up(self) -> None:
        """Turn the older half into sums; what is still on its way keeps only its later lines."""
        old = self._lines()[: self.max_lines // 2]
        number, last, past, _ = self._head()
        kinds = past.get("kinds", {})
        for line in old:
            sums = kinds.setdefault(
                line["kind"], {"messages": 0, "acknowledged": 0, "plain_bytes": 0, "wire_bytes": 0}
            )
            if line["what"] == BEGUN:
                sums["messages"] += 1
                sums["plain_bytes"] += line["plain_bytes"]
            sums["acknowledged"] += line["what"] == ACKNOWLEDGED
            if line["what"] in (ACKNOWLEDGED, REFUSED, PAUSED):
                sums["wire_bytes"] += line["wire_bytes"]
        kinds.pop("", None)
        past = {
            "lines": past.get("lines", 0) + len(old),
            "until_s": old[-1]["local_s"],
            "kinds": kinds,
        }
        anchor = old[-1]["hash"]
        with self.mailbox.transaction() as db:
            db.execute("DELETE FROM ledger WHERE line <= ?", (old[-1]["line"],))
            self._keep_head(number, last, past, anchor)
            nothing = Posted(b"", "", "", "", 0, b"", b"", "", Body(b"", 0))
            self._append(SUMMED, _Open(nothing, ""), note=_digest(past, anchor))

    def _lines(self) -> list[dict[str, Any]]:
        with self.mailbox.transaction() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM ledger ORDER BY line").fetchall()
        names = [name.strip() for name in _COLUMNS.split(",")]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _kept(self) -> int:
        with self.mailbox.transaction() as db:
            return int(db.execute("SELECT COUNT(*) FROM ledger").fetchone()[0])

    def _head(self) -> tuple[int, bytes, dict[str, Any], bytes]:
        with self.mailbox.transaction() as db:
            row = db.execute("SELECT line, hash, past, anchor FROM ledger_head").fetchone()
        return (row[0], row[1], json.loads(row[2]), row[3]) if row else (0, _START, {}, _START)

    def _keep_head(self, line: int, last: bytes, past: dict[str, Any], anchor: bytes) -> None:
        with self.mailbox.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO ledger_head VALUES (1, ?, ?, ?, ?)",
                (line, last, json.dumps(past, sort_keys=True), anchor),
            )

    def _trusted_s(self) -> int:
        with self.mailbox.transaction() as db:
            row = db.execute("SELECT header FROM letters ORDER BY id DESC LIMIT 1").fetchone()
        return Header.decode(row[0]).created_s if row else 0


def field_sizes(message: AnyMessage) -> dict[str, int]:
    """Return the encoded size in bytes of each field of `message`."""
    encode = msgspec.msgpack.encode
    return {name: len(encode(getattr(message, name))) for name in message.__struct_fields__}


def _hash(before: bytes, line: dict[str, Any]) -> bytes:
    values = [value for name, value in line.items() if name != "hash"]
    return hashlib.sha256(before + msgspec.msgpack.encode(values)).digest()


def _digest(past: dict[str, Any], anchor: bytes) -> str:
    return hashlib.sha256(json.dumps(past, sort_keys=True).encode() + anchor).hexdigest()


def _entry(lines: list[dict[str, Any]]) -> Entry:
    first, last = lines[0], lines[-1]
    ends = [line for line in lines if line["what"] in (ACKNOWLEDGED, REFUSED)]
    counted, whole, open_count = 0, True, False
    for line in lines:
        if line["what"] in (BEGUN, RESUMED):
            # A line of our own process repeats what was counted so far; a new one starts at 0.
            whole = whole and not (open_count and line["wire_bytes"] == 0)
            open_count = True
        else:
            counted += line["wire_bytes"]
            open_count = False
    return Entry(
        local_s=first["local_s"],
        trusted_s=first["trusted_s"],
        kind=first["kind"],
        task=first["task"],
        stream=first["stream"].hex(),
        to=first["recipient"],
        key=last["key_id"],
        plain_bytes=first["plain_bytes"],
        wire_bytes=counted,
        whole=whole and not open_count,
        fields=json.loads(first["fields"] or "{}"),
        state=ends[-1]["what"] if ends else "on its way",
        note=ends[-1]["note"] if ends else "",
    )
