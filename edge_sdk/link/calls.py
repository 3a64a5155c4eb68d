"""Questions that are answered at once or not at all: one sealed message there, one back.

Knows envelopes, keys and who waits for what. Does not know topics, threads of the link, or what
messages mean; nothing here touches the mailbox, since an answer that comes late is worth nothing.

A call is one frame on the topics that the courier uses: type 8, the 16-byte stream, the manifest's
length, the manifest, the one chunk. It is sealed and signed as any other message (wire/seal.py).
An answer has the question's task and running number in its signed header, so it answers nothing
else; a question is taken once, in the order of its numbers, as long as its sender is remembered.
Not promised: that it arrives. Delivery is the courier's.
"""

import logging
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Full, Queue

from edge_sdk.errors import FleetError, LinkError, LocalProtocolError, RemoteProtocolError
from edge_sdk.store.keyring import Keyring, OneKey
from edge_sdk.wire.messages import AnyMessage, decode, encode
from edge_sdk.wire.seal import (
    CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    Header,
    PublicIdentity,
    new_stream,
    peek_header,
    read_manifest,
    seal,
    unseal,
)

logger = logging.getLogger(__name__)

CALL = 8
"""The first byte of a frame that is a call; the courier's own frames have 1 to 7."""
LIFETIME_S = 600
"""A question that is older than this, by its sender's clock and ours, is not taken."""
WAITING = 64
"""Questions that wait for an answer at most; others are dropped, and their senders go on alone."""
_REMEMBERED = 4096  # (sender, task) pairs whose running numbers are known
_HEAD = struct.Struct(">B16sH")

Answerer = Callable[[str, AnyMessage], AnyMessage | None]
"""(sender, question) -> the answer, or None for none; called on one thread."""


@dataclass(slots=True)
class _Waiting:
    ready: threading.Event = field(default_factory=threading.Event)
    answer: AnyMessage | None = None


class Calls:
    """One party's calls. A device asks, the coordinator answers.

    Args:
        publish: (peer, kind, frame) -> whether the link took it.
        note: called with (peer, stream, question, manifest) before a question leaves; raises to
            keep it here.
    """

    def __init__(
        self,
        publish: Callable[[str, str, bytes], bool],
        ring: Keyring | OneKey,
        *,
        tenant: str,
        me: str,
        lookup: Callable[[str], PublicIdentity | None],
        now: Callable[[], float],
        note: Callable[[str, bytes, AnyMessage, bytes], None] | None = None,
    ) -> None:
        self._publish, self._ring, self._tenant, self._me = publish, ring, tenant, me
        self._lookup, self._now, self._note = lookup, now, note
        self._lock = threading.Lock()
        self._numbers: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._waiting: dict[tuple[str, str, int], _Waiting] = {}
        self._arrived: Queue[tuple[str, bytes] | None] = Queue(WAITING)
        self._answerer: Answerer | None = None
        self._thread: threading.Thread | None = None

    def ask(self, to: str, question: AnyMessage, *, timeout_s: float) -> AnyMessage:
        """Send `question` and return its answer. Safe from several threads.

        Raises:
            LinkError: not connected, the peer's keys are unknown, or no answer in time.
            LocalProtocolError: the question is longer than a chunk.
        """
        task: str = getattr(question, "task_id")  # noqa: B009 - not every message has one
        with self._lock:
            number = self._numbers[to, task] = self._numbers.pop((to, task), 0) + 1
            self._trim()
            waiting = self._waiting[to, task, number] = _Waiting()
        try:
            if not self._send(to, question, task, number, noted=True):
                raise LinkError("not connected; nothing was asked")
            if not waiting.ready.wait(timeout_s) or waiting.answer is None:
                raise LinkError(f"no answer within {timeout_s:g} s")
            return waiting.answer
        finally:
            with self._lock:
                del self._waiting[to, task, number]

    def answer_with(self, answerer: Answerer) -> None:
        """Answer questions from now on, one after another on a thread of their own."""
        self._answerer = answerer
        self._thread = threading.Thread(target=self._serve, name=f"{self._me}-calls", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        if self._thread is not None:
            self._answerer = None
            self._arrived.put(None)
            self._thread.join()
            self._thread = None

    def receive(self, peer: str, frame: bytes) -> None:
        """Take a frame from the link; returns at once."""
        if self._thread is None:
            if self._waiting:  # else nothing was asked, and no signature is worth checking
                self._guarded(peer, frame)
            return
        try:
            self._arrived.put_nowait((peer, frame))
        except Full:
            logger.warning("a call of %s was dropped: %d wait already", peer[:12], WAITING)

    # --- one frame --------------------------------------------------------------------------

    def _send(self, to: str, message: AnyMessage, task: str, number: int, *, noted: bool) -> bool:
        public = self._lookup(to)
        if public is None:
            raise LinkError(f"the keys of {to} are not known yet; try again later")
        plain, now_s, stream = encode(message), int(self._now()), new_stream()
        if len(plain) > CHUNK_BYTES:
            raise LocalProtocolError(f"a call of {len(plain)} bytes is over {CHUNK_BYTES}")
        sealed = seal(
            plain,
            sender=self._ring.identity,
            recipient=public,
            tenant=self._tenant,
            sender_id=self._me,
            recipient_id=to,
            kind=type(message).__name__,
            task=task,
            stream=stream,
            sequence=number,
            created_s=now_s,
            expires_s=now_s + LIFETIME_S,
        )
        if noted and self._note is not None:
            self._note(to, stream, message, sealed.manifest)
        head = _HEAD.pack(CALL, stream, len(sealed.manifest))
        return self._publish(to, type(message).__name__, head + sealed.manifest + sealed.chunks[0])

    def _serve(self) -> None:
        while (item := self._arrived.get()) is not None:
            self._guarded(*item)

    def _guarded(self, peer: str, frame: bytes) -> None:
        try:
            header, message = self._opened(peer, frame)
            if not self._told(peer, header, message):
                self._answer(peer, header, message)
        except FleetError as exc:
            logger.warning("a call of %s was not taken: %s", peer[:12], exc)
        except Exception:
            logger.exception("a call of %s failed unexpectedly", peer[:12])

    def _opened(self, peer: str, frame: bytes) -> tuple[Header, AnyMessage]:
        if len(frame) < _HEAD.size:
            raise RemoteProtocolError(f"{len(frame)} bytes are no call")
        _, stream, length = _HEAD.unpack_from(frame)
        manifest, chunk = frame[_HEAD.size :][:length], frame[_HEAD.size + length :]
        if length > MAX_MANIFEST_BYTES or peek_header(manifest).stream != stream:
            raise RemoteProtocolError("a call names another stream than its manifest")
        public = self._lookup(peer)
        if public is None:
            raise RemoteProtocolError("this sender is not enrolled here, or was revoked")
        read = read_manifest(
            manifest, public, tenant=self._tenant, sender_id=peer, recipient_id=self._me
        )
        opener = self._ring.opener(read.header.recipient_key, read.header.suite)
        if opener is None:
            raise RemoteProtocolError("sealed for a key that is not in use here any more")
        if read.header.expired(self._now()):
            raise RemoteProtocolError("it expired before it arrived; check both clocks")
        message = decode(unseal(read, (chunk,), opener))
        if (type(message).__name__, getattr(message, "task_id", "")) != (
            read.header.kind,
            read.header.task,
        ):
            raise RemoteProtocolError("a call's header announces another message than it holds")
        return read.header, message

    def _told(self, peer: str, header: Header, message: AnyMessage) -> bool:
        with self._lock:
            waiting = self._waiting.get((peer, header.task, header.sequence))
        if waiting is None:
            return False
        waiting.answer = message
        waiting.ready.set()
        return True

    def _answer(self, peer: str, header: Header, question: AnyMessage) -> None:
        if self._answerer is None:
            return  # an answer that came too late
        with self._lock:
            known = self._numbers.pop((peer, header.task), 0)
            self._numbers[peer, header.task] = max(known, header.sequence)
            self._trim()
        if header.sequence <= known:
            raise RemoteProtocolError("a question was repeated")
        answer = self._answerer(peer, question)
        if answer is not None:
            self._send(peer, answer, header.task, header.sequence, noted=False)

    def _trim(self) -> None:
        while len(self._numbers) > _REMEMBERED:
            self._numbers.popitem(last=False)
