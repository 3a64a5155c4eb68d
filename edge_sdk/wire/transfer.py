"""How a sealed message crosses a lossy link in chunks: bytes and frames in, frames out.

Knows frames, windows and which chunks are missing. Does not know topics, threads, storage, clocks
or how anything is encrypted.

    sender                                 receiver
      Offer  manifest            ------->    verify it
             <-------  Want  which chunks are missing
      Chunk, Chunk, Chunk (ask)  ------->    keep them
             <-------  Have  which chunks are held
      ...                                    open, accept, commit
             <-------  Done  signed; only now does the sender forget
             <-------  Reject signed, instead of any of the above
             <-------  Slow   too much at once: fewer chunks, or wait for a Want

After silence or a reconnect the sender offers again and the receiver answers with what is still
missing, so nothing that arrived is sent twice. A broker may drop, repeat or forge any frame: Want,
Have, Slow and Chunk can then cost time only, because chunks are checked against signed hashes and
the end of a transfer, either way, is signed by the receiver.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from edge_sdk.errors import RemoteProtocolError, SealError
from edge_sdk.wire.seal import (
    CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_MANIFEST_BYTES,
    SIGNATURE_BYTES,
    STREAM_BYTES,
    TAG_BYTES,
    Identity,
    Manifest,
    Opener,
    PublicIdentity,
    manifest_digest,
)

WINDOW_BYTES = 1024 * 1024
"""What may be on its way unacknowledged; under the queues of the brokers we know."""
MAX_REASON_BYTES = 512
KEYS_BYTES = 64
MAX_BITMAP_BYTES = MAX_CHUNKS // 8
MAX_FRAME_BYTES = 1 + STREAM_BYTES + 1 + KEYS_BYTES + MAX_MANIFEST_BYTES
"""An Offer of the largest message; a chunk frame is 64 KiB and 38 bytes."""

_DONE = "symbiont/v1/done"
_REJECT = "symbiont/v1/reject"
_CHUNK = struct.Struct(">IB")
_AFTER = struct.Struct(">I")
_WAIT = struct.Struct(">H")


# --- frames -----------------------------------------------------------------------------------


class Refusal(IntEnum):
    """Why a stream is refused for good."""

    EXPIRED = 1
    UNKNOWN_SENDER = 2  # not enrolled, or revoked
    WRONG_KEY = 3  # sealed to a receive key we no longer have: fetch the new one and seal again
    UNREADABLE = 4  # did not authenticate
    REPEATED = 5  # a replay, or a second message of a kind for one task
    ENROLMENT = 6  # the enrolment code was refused; the reason says why
    NOT_UNDERSTOOD = 7  # opened, but not a message of the vocabulary
    TOO_LARGE = 8


@dataclass(frozen=True, slots=True)
class Offer:
    """The sender has this message. `keys` are the sender's 64 public bytes, for Enrol only."""

    stream: bytes
    manifest: bytes
    keys: bytes = b""


@dataclass(frozen=True, slots=True)
class Want:
    """The receiver lacks these chunks."""

    stream: bytes
    missing: frozenset[int]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One encrypted chunk; `ask` asks for a Have once it is kept."""

    stream: bytes
    index: int
    ask: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Have:
    """The receiver holds these chunks; `after` is the index of the chunk that asked."""

    stream: bytes
    after: int
    held: frozenset[int]


@dataclass(frozen=True, slots=True)
class Done:
    """The message is committed at the receiver, who signs that."""

    stream: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Reject:
    """The message will never be accepted, and why, in one sentence; signed by the receiver."""

    stream: bytes
    refusal: Refusal
    reason: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class Slow:
    """The receiver has too much at once: halve the window, and do not offer again for `wait_s`.

    A Want or Have that comes earlier ends the wait.
    """

    stream: bytes
    wait_s: int


Frame = Offer | Want | Chunk | Have | Done | Reject | Slow
Answer = Want | Have | Done | Reject | Slow
"""What a receiver says to a sender."""
_CODES: dict[type, int] = {Offer: 1, Want: 2, Chunk: 3, Have: 4, Done: 5, Reject: 6, Slow: 7}


def encode_frame(frame: Frame) -> bytes:
    """Return the bytes of `frame`."""
    match frame:
        case Offer():
            body = bytes([len(frame.keys)]) + frame.keys + frame.manifest
        case Want():
            body = _bitmap(frame.missing)
        case Chunk():  # the one that counts: its data are copied once
            head = b"\3" + frame.stream + _CHUNK.pack(frame.index, frame.ask)
            return b"".join((head, frame.data))
        case Have():
            body = _AFTER.pack(frame.after) + _bitmap(frame.held)
        case Done():
            body = frame.signature
        case Reject():
            reason = _short(frame.reason)
            body = bytes([frame.refusal]) + frame.signature + reason
        case Slow():
            body = _WAIT.pack(frame.wait_s)
    return bytes([_CODES[type(frame)]]) + frame.stream + body


def decode_frame(data: bytes) -> Frame:
    """Return the frame that `data` encodes.

    Raises:
        RemoteProtocolError: not a frame, or longer than any frame can be.
    """
    if not 1 + STREAM_BYTES <= len(data) <= MAX_FRAME_BYTES:
        raise RemoteProtocolError(
            f"a frame of {len(data)} bytes is outside {1 + STREAM_BYTES} to {MAX_FRAME_BYTES}"
        )
    stream = bytes(data[1 : 1 + STREAM_BYTES])
    try:
        if data[0] == 3:
            return _parse_chunk(stream, data)
        return _parse(data[0], stream, bytes(data[1 + STREAM_BYTES :]))
    except (IndexError, ValueError, struct.error) as exc:  # UnicodeDecodeError is a ValueError
        raise RemoteProtocolError(f"a frame of type {data[0]} is malformed") from exc


def _parse(code: int, stream: bytes, body: bytes) -> Frame:
    match code:
        case 1:
            if body[0] not in (0, KEYS_BYTES) or len(body) < 1 + body[0]:
                raise ValueError(body[0])
            return Offer(stream, body[1 + body[0] :], body[1 : 1 + body[0]])
        case 2:
            return Want(stream, _indices(body))
        case 4:
            (after,) = _AFTER.unpack_from(body)
            return Have(stream, after, _indices(body[_AFTER.size :]))
        case 5:
            if len(body) != SIGNATURE_BYTES:
                raise ValueError(len(body))
            return Done(stream, body)
        case 6:
            reason = body[1 + SIGNATURE_BYTES :]
            signature = body[1 : 1 + SIGNATURE_BYTES]
            if len(signature) != SIGNATURE_BYTES or len(reason) > MAX_REASON_BYTES:
                raise ValueError(len(body))
            return Reject(stream, Refusal(body[0]), reason.decode(), signature)
        case 7:
            if len(body) != _WAIT.size:
                raise ValueError(len(body))
            return Slow(stream, *_WAIT.unpack(body))
    raise ValueError(code)


def _parse_chunk(stream: bytes, frame: bytes) -> Chunk:
    index, ask = _CHUNK.unpack_from(frame, 1 + STREAM_BYTES)
    data = bytes(frame[1 + STREAM_BYTES + _CHUNK.size :])
    if index >= MAX_CHUNKS or ask > 1 or len(data) > CHUNK_BYTES + TAG_BYTES:
        raise ValueError(index)
    return Chunk(stream, index, bool(ask), data)


def _bitmap(indices: Iterable[int]) -> bytes:
    bits = bytearray(MAX_BITMAP_BYTES)
    for index in indices:
        bits[index >> 3] |= 1 << (index & 7)
    return bytes(bits.rstrip(b"\0"))


def _indices(bitmap: bytes) -> frozenset[int]:
    if len(bitmap) > MAX_BITMAP_BYTES:
        raise ValueError(len(bitmap))
    return frozenset(
        8 * at + bit
        for at, byte in enumerate(bitmap)
        if byte
        for bit in range(8)
        if byte >> bit & 1
    )


def _short(reason: str) -> bytes:
    return reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()


def sign_done(stream: bytes, digest: bytes, me: Identity) -> Done:
    """Return the Done for a committed message; `digest` is its `Manifest.digest`."""
    return Done(stream, me.sign(_DONE, stream + digest))


def sign_reject(
    stream: bytes, digest: bytes, refusal: Refusal, reason: str, me: Identity
) -> Reject:
    """Return the Reject of a message; a long `reason` is cut to MAX_REASON_BYTES."""
    cut = _short(reason)
    signature = me.sign(_REJECT, stream + digest + bytes([refusal]) + cut)
    return Reject(stream, refusal, cut.decode(), signature)


# --- sending ----------------------------------------------------------------------------------


class Envelope(Protocol):
    """A sealed message; the chunks may be made when they are asked for (`seal.Sealed` has all)."""

    @property
    def manifest(self) -> bytes:
        """The signed manifest."""

    @property
    def chunks(self) -> Sequence[bytes]:
        """The encrypted chunks."""


class Outgoing:
    """One message being sent to `peer`. The caller publishes every frame it returns."""

    def __init__(
        self,
        stream: bytes,
        sealed: Envelope,
        peer: PublicIdentity,
        *,
        keys: bytes = b"",
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self.stream = stream
        self.done = False
        self.rejected: Reject | None = None
        self._sealed = sealed
        self._peer = peer
        self._digest = manifest_digest(sealed.manifest)
        self._keys = keys
        self._window_limit = max(1, window_bytes // CHUNK_BYTES)
        self._window = self._window_limit  # chunks
        self._held: frozenset[int] = frozenset()
        self._to_send: list[int] = []  # last one first
        self._in_flight: set[int] = set()
        self._sent_at: dict[int, int] = {}  # index -> position in the order of sending
        self._sent = 0
        self._narrowed_at = 0  # losses of what went out before this belong to one crowding

    @property
    def acknowledged_chunks(self) -> int:
        """Return how many of the chunks the receiver holds, as far as it has said."""
        return len(self._held)

    def start(self) -> list[Frame]:
        """Return the frames that open the transfer."""
        return [Offer(self.stream, self._sealed.manifest, self._keys)]

    def resend(self) -> list[Frame]:
        """Return the frames to send after silence or a reconnect; the window is halved."""
        self._narrow()
        self._to_send = []
        self._in_flight = set()
        return self.start()

    def receive(self, frame: Answer) -> list[Frame]:
        """Take the receiver's frame and return the frames to send now.

        Raises:
            RemoteProtocolError: a frame for another stream, or a chunk that does not exist.
            SealError: a Done or Reject that the receiver did not sign; nothing changes.
        """
        if frame.stream != self.stream:
            raise RemoteProtocolError("a frame of another stream was given to this transfer")
        if self.done or self.rejected:
            return []
        match frame:
            case Done():
                self._peer.verify(_DONE, self.stream + self._digest, frame.signature)
                self.done = True
            case Reject():
                body = self.stream + self._digest + bytes([frame.refusal]) + _short(frame.reason)
                self._peer.verify(_REJECT, body, frame.signature)
                self.rejected = frame
            case Want():
                everything = self._checked(frame.missing)
                self._held = everything - frame.missing
                self._to_send = sorted(frame.missing, reverse=True)
                self._in_flight = set()
                return self._fill()
            case Have():
                self._checked(frame.held)
                self._hear(frame)
                return self._fill()
            case Slow():
                self._narrow()
        return []

    def _checked(self, indices: frozenset[int]) -> frozenset[int]:
        everything = frozenset(range(len(self._sealed.chunks)))
        if not indices <= everything:
            raise RemoteProtocolError(
                f"chunk {max(indices)} was asked for, but there are {len(everything)}"
            )
        return everything

    def _hear(self, frame: Have) -> None:
        self._held |= frame.held
        self._in_flight -= frame.held
        # A topic keeps its order: what went out before the chunk that asked and has not arrived is
        # lost. If a broker reordered after all, this costs a repeated chunk, nothing more.
        asked_at = self._sent_at.get(frame.after, -1)
        lost = {index for index in self._in_flight if self._sent_at[index] < asked_at}
        self._in_flight -= lost
        waiting = set(self._to_send) - frame.held | lost
        self._to_send = sorted(waiting, reverse=True)
        if not lost:
            self._window = min(self._window_limit, self._window + 1)
        elif min(self._sent_at[index] for index in lost) >= self._narrowed_at:
            self._narrow()  # a broker that drops is a broker with a full queue

    def _narrow(self) -> None:
        self._window = max(1, self._window // 2)
        self._narrowed_at = self._sent

    def _fill(self) -> list[Frame]:
        frames: list[Frame] = []
        ask_every = max(1, self._window // 2)
        while self._to_send and len(self._in_flight) < self._window:
            index = self._to_send.pop()
            self._in_flight.add(index)
            self._sent_at[index] = self._sent
            self._sent += 1
            full = not self._to_send or len(self._in_flight) >= self._window
            ask = full or (len(frames) + 1) % ask_every == 0
            frames.append(Chunk(self.stream, index, ask, self._sealed.chunks[index]))
        return frames


# --- receiving --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """What to do after a chunk: keep `piece` at its place, then publish `reply`.

    `piece` is None for a repeat. `complete` is true once, for the chunk that completes the message:
    accept it, and only then publish the signed Done.
    """

    piece: bytes | None
    reply: tuple[Frame, ...]
    complete: bool


class Incoming:
    """One message being received, from a manifest that was verified and pieces already `held`.

    Each chunk is checked against its signed hash and opened as it comes, so what is kept is the
    message itself. If keeping a piece fails, forget this object: the next Offer starts again from
    what is really there.

    Raises:
        RemoteProtocolError: the message is larger than `max_bytes`.
    """

    def __init__(
        self, manifest: Manifest, opener: Opener, held: Iterable[int] = (), *, max_bytes: int
    ) -> None:
        header = manifest.header
        if header.plaintext_bytes > max_bytes:
            raise RemoteProtocolError(
                f"a message of {header.plaintext_bytes} bytes is over the limit of {max_bytes}"
            )
        self.manifest = manifest
        self._opener = opener
        self._held = set(held)

    @property
    def complete(self) -> bool:
        """Return whether every piece is here."""
        return len(self._held) == self.manifest.header.chunks

    @property
    def held_chunks(self) -> int:
        """Return how many pieces are here."""
        return len(self._held)

    def want(self) -> Want:
        """Return the answer to an Offer: what is still missing."""
        header = self.manifest.header
        return Want(header.stream, frozenset(range(header.chunks)) - self._held)

    def receive(self, chunk: Chunk) -> Received:
        """Take one chunk, checked against the signed manifest.

        Raises:
            RemoteProtocolError: not a chunk of this message.
        """
        header = self.manifest.header
        if chunk.stream != header.stream:
            raise RemoteProtocolError(f"chunk {chunk.index} does not belong to this message")
        piece = None
        if chunk.index not in self._held:
            try:
                piece = self._opener.chunk(chunk.index, chunk.data)
            except SealError as exc:
                text = f"chunk {chunk.index} is not the chunk that was signed"
                raise RemoteProtocolError(text) from exc
            self._held.add(chunk.index)
            if self.complete:
                return Received(piece, (), True)
        ask = chunk.ask and not self.complete
        reply = (Have(header.stream, chunk.index, frozenset(self._held)),) if ask else ()
        return Received(piece, reply, False)
