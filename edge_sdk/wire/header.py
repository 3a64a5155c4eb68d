"""The header of an envelope: what is known of a message before it is opened.

Knows its fields, their ranges and their bytes. Does not know keys, encryption or signatures.

Fixed order, each name with one byte of length before it: the bytes sent are the bytes signed, and
a header has one encoding only.
"""

import re
import struct
from dataclasses import dataclass
from typing import TypedDict

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError
from edge_sdk.wire.identity import KEY_ID_BYTES, SUITE_HYBRID, SUITE_X25519
from edge_sdk.wire.messages import MAX_MESSAGE_BYTES

VERSION = 1
CHUNK_BYTES = 64 * 1024
TAG_BYTES = 16
STREAM_BYTES = 16
MAX_CHUNKS = MAX_MESSAGE_BYTES // CHUNK_BYTES
MAX_HEADER_BYTES = 1024
"""Five names of at most 128 bytes and 76 bytes of numbers fit; no honest header is longer."""

_NAMES = ("tenant", "sender", "recipient", "kind", "task")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TIMES = struct.Struct(">QQQ")  # sequence, created, expires
_SIZES = struct.Struct(">QII")  # plaintext, chunk size, chunks


class Fields(TypedDict):
    """What the caller chooses of a header; the rest follows from keys and message."""

    tenant: str
    sender_id: str
    recipient_id: str
    kind: str
    task: str
    stream: bytes
    sequence: int
    created_s: int
    expires_s: int


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a message before it is opened. Times are seconds since 1970, UTC.

    `sender_key` and `recipient_key` are key ids of 8 bytes; `sequence` counts the messages from
    this sender to this recipient from 1; `stream` names this transfer.
    """

    version: int
    suite: int
    tenant: str
    sender: str
    sender_key: bytes
    recipient: str
    recipient_key: bytes
    kind: str
    task: str
    stream: bytes
    sequence: int
    created_s: int
    expires_s: int
    plaintext_bytes: int
    chunk_bytes: int
    chunks: int

    def expired(self, now_s: float) -> bool:
        """Return whether the sender no longer wants this message delivered at `now_s`."""
        return now_s >= self.expires_s

    def encode(self) -> bytes:
        """Return the header's bytes.

        Raises:
            LocalProtocolError: a field is out of its range.
        """
        if fault := _fault(self):
            raise LocalProtocolError(f"cannot make this header: {fault}")
        names = self._names(*_NAMES)
        times = (self.sequence, self.created_s, self.expires_s)
        numbers = _TIMES.pack(*times) + self._sizes()
        ids = self.sender_key + self.recipient_key + self.stream
        return bytes([self.version, self.suite]) + names + ids + numbers

    def shared(self) -> bytes:
        """Return the bytes of the fields that all recipients of one encrypted body have alike."""
        names = self._names("tenant", "sender", "kind", "task")
        return bytes([self.version]) + names + self.sender_key + self._sizes()

    def _names(self, *names: str) -> bytes:
        texts = [getattr(self, name).encode("ascii") for name in names]
        return b"".join(bytes([len(text)]) + text for text in texts)

    def _sizes(self) -> bytes:
        return _SIZES.pack(self.plaintext_bytes, self.chunk_bytes, self.chunks)

    @classmethod
    def decode(cls, data: bytes) -> "Header":
        """Return the header in `data`, which must be exactly one header.

        Raises:
            RemoteProtocolError: anything else.
        """
        if len(data) > MAX_HEADER_BYTES:
            raise RemoteProtocolError(f"{len(data)} bytes of header, {MAX_HEADER_BYTES} at most")
        try:
            header = _parse(data)
        except (IndexError, struct.error, UnicodeDecodeError) as exc:
            raise RemoteProtocolError("the header is cut short or not a header") from exc
        if fault := _fault(header):
            raise RemoteProtocolError(f"the header is not acceptable: {fault}")
        return header


def count_chunks(plaintext_bytes: int) -> int:
    """Return how many chunks carry `plaintext_bytes`; an empty message still has one."""
    return max(1, -(-plaintext_bytes // CHUNK_BYTES))


def plain_size(header: Header, index: int) -> int:
    """Return how many bytes of plaintext chunk `index` carries."""
    if index < header.chunks - 1:
        return CHUNK_BYTES
    return header.plaintext_bytes - (header.chunks - 1) * CHUNK_BYTES


def chunk_size(header: Header, index: int) -> int:
    """Return the encrypted size of chunk `index`, so that a wrong one is refused unread."""
    return plain_size(header, index) + TAG_BYTES


def _parse(data: bytes) -> Header:
    at = 2
    names = []
    for _ in _NAMES:
        end = at + 1 + data[at]
        names.append(data[at + 1 : end].decode("ascii"))
        at = end
    ids = at + 2 * KEY_ID_BYTES
    times_at = ids + STREAM_BYTES
    times = _TIMES.unpack_from(data, times_at)
    sizes = _SIZES.unpack(data[times_at + _TIMES.size :])  # also refuses anything appended
    tenant, sender, recipient, kind, task = names
    keys = (data[at : at + KEY_ID_BYTES], data[at + KEY_ID_BYTES : ids])
    first = (data[0], data[1], tenant, sender, keys[0], recipient, keys[1], kind, task)
    return Header(*first, data[ids:times_at], *times, *sizes)


def _fault(header: Header) -> str:
    if header.version != VERSION or header.suite not in (SUITE_X25519, SUITE_HYBRID):
        return f"version {header.version}, suite {header.suite} is unknown; update this side"
    for name in _NAMES:
        if not _NAME.fullmatch(getattr(header, name)):
            return f"{name} is not 1 to 128 letters, digits, '.', '_' or '-'"
    if (len(header.sender_key), len(header.recipient_key), len(header.stream)) != (8, 8, 16):
        return "key ids are 8 bytes and stream ids 16"
    for name in ("sequence", "created_s", "expires_s"):
        if not 0 <= getattr(header, name) < 2**63:  # what SQLite stores
            return f"{name} is outside 0 to 2^63 - 1"
    if not 0 <= header.plaintext_bytes <= MAX_MESSAGE_BYTES:
        return f"{header.plaintext_bytes} bytes are over the limit of {MAX_MESSAGE_BYTES}"
    if header.chunk_bytes != CHUNK_BYTES:
        return f"chunks of {header.chunk_bytes} bytes, not {CHUNK_BYTES}"
    if header.chunks != count_chunks(header.plaintext_bytes):
        return f"{header.chunks} chunks do not hold {header.plaintext_bytes} bytes"
    return ""
