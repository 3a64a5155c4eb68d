"""The outgoing half of the courier: what is on its way, to whom, and when to try again.

Knows the outbox, patience and how many transfers run at once. Does not know topics, threads or
brokers: it is driven by the courier's worker with frames and ticks, and publishes through it.

Nothing here has to survive: the outbox remembers each message and how it was sealed, the receiver
remembers which chunks it has, and an Offer asks for the rest.
"""

import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_sdk.errors import SealError
from edge_sdk.link.base import Link
from edge_sdk.store.keyring import Keyring, OneKey
from edge_sdk.store.ledger import Ledger
from edge_sdk.store.mailbox import Mailbox, Posted
from edge_sdk.wire.seal import (
    CHUNK_BYTES,
    Identity,
    PublicIdentity,
    Sealed,
    peek_header,
    reseal,
    seal,
)
from edge_sdk.wire.transfer import (
    Done,
    Frame,
    Have,
    Offer,
    Outgoing,
    Refusal,
    Reject,
    Want,
    encode_frame,
)

logger = logging.getLogger(__name__)

STREAMS_PER_PEER = 4
"""Transfers to one peer at a time; more would only share the same link."""
LOADED_BYTES = 256 * 1024 * 1024
"""Messages held in memory at once; those beyond are loaded when their receiver asks for chunks."""
LONGEST_WAIT_S = 300.0
_IDLE_RESENDS = 2  # after so many unanswered resends a stream's chunks leave the memory
_KNOCK_PAUSE_S = 1.0  # a peer that keeps knocking does not make us resend more often than this


@dataclass(slots=True)
class _Stream:
    stream: bytes
    to: str
    kind: str
    size: int
    manifest: bytes
    outgoing: Outgoing | None
    sent_at: float
    due: float
    wait_s: float
    quiet: int = 0
    acknowledged: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one message is. `outgoing` says whether it leaves or arrives; sizes in bytes."""

    stream: bytes
    peer: str
    kind: str
    outgoing: bool
    done_bytes: int
    total_bytes: int


@dataclass(slots=True)
class Sender:
    """Sends what the outbox holds until the receiver's signed Done arrives."""

    mailbox: Mailbox
    ring: Keyring | OneKey
    tenant: str
    me: str
    lookup: Callable[[str], PublicIdentity | None]
    now: Callable[[], float]
    clock: Callable[[], float]
    rng: random.Random
    link: Link
    publish: Callable[[str, str, bytes], bool]
    """(peer, kind, frame bytes) -> whether the link took it."""
    settled: Callable[[bytes], None]
    """Called when a stream is done or parked."""
    progress: Callable[[Progress], None]
    patience_s: float
    window_bytes: int
    lifetime_s: float
    ledger: Ledger | None = None
    """On a device: where it is noted what leaves, before it does."""
    _streams: dict[bytes, _Stream] = field(default_factory=dict)
    _peers: dict[bytes, str] = field(default_factory=dict)
    _gone: deque[str] = field(default_factory=deque)

    @property
    def identity(self) -> Identity:
        """The keys we sign with now."""
        return self.ring.identity

    def expect(self, stream: bytes, to: str) -> None:
        """Note whom a new stream is for, so that it is not read from the disk to find out."""
        self._peers[stream] = to

    def forget(self, peer: str) -> None:
        """Stop what is on its way to `peer`; the next refill begins anew if it may. Any thread."""
        self._gone.append(peer)

    # --- called by the courier's worker -----------------------------------------------------

    def refill(self) -> None:
        """Start what waits in the outbox, as far as the limits allow."""
        if not self.link.connected:
            return
        pending = self.mailbox.pending()
        busy: dict[str, int] = {}
        for current in self._streams.values():
            busy[current.to] = busy.get(current.to, 0) + 1
        for stream in pending:
            known = self._peers.get(stream)
            if stream in self._streams or busy.get(known or "", 0) >= STREAMS_PER_PEER:
                continue
            item = self.mailbox.posted(stream)
            if item is None:
                continue
            self._peers[stream] = item.to
            peer = self.lookup(item.to)
            if peer is None or busy.get(item.to, 0) >= STREAMS_PER_PEER:
                continue  # a peer whose keys we do not know yet; asked again at the next refill
            busy[item.to] = busy.get(item.to, 0) + 1
            self._begin(item, peer)

    def take(self, peer: str, frame: Want | Have | Done | Reject) -> str:
        """Handle one answer of `peer` and return the kind of message it is about.

        An answer to nothing that is on its way (a late repetition) is ignored.

        Raises:
            SealError: a Done or Reject that this peer did not sign.
        """
        current = self._streams.get(frame.stream)
        if current is None or current.to != peer:
            return "repeated"
        outgoing = current.outgoing or self._load(current)
        if outgoing is None:
            return current.kind
        frames = outgoing.receive(frame)
        if outgoing.done:
            with self.mailbox.transaction():
                self.mailbox.mark_done(current.stream)
                self._note_end(current)
            self._report(current, current.size)
            self._settle(current)
        elif outgoing.rejected is not None:
            self._rejected(current, outgoing.rejected)
        else:
            self._advance(current, outgoing, frames)
        return current.kind

    def tick(self) -> None:
        """Offer again what has been silent for too long."""
        while self._gone:
            peer = self._gone.popleft()
            for current in [s for s in self._streams.values() if s.to == peer]:
                self._end(current)
        if not self.link.connected:
            return
        now = self.clock()
        for current in [s for s in self._streams.values() if s.due <= now]:
            self._again(current)

    def wake(self, peer: str | None = None) -> None:
        """A peer showed itself (None: the link is up again): stop waiting for a timeout."""
        now = self.clock()
        for current in self._streams.values():
            waits = current.quiet > 0 and now - current.sent_at > _KNOCK_PAUSE_S
            if peer is None or (current.to == peer and waits):
                current.wait_s, current.due = self.patience_s, now

    def next_due(self) -> float | None:
        """When `tick` has something to do, on the courier's clock."""
        return min((s.due for s in self._streams.values()), default=None)

    # --- one stream -------------------------------------------------------------------------

    def _begin(self, item: Posted, peer: PublicIdentity) -> None:
        sealed = self._sealed(item, peer)
        if self.ledger is not None:
            self.ledger.begin(item, sealed.manifest)
        now = self.clock()
        current = _Stream(
            stream=item.stream,
            to=item.to,
            kind=item.kind,
            size=len(item.message),
            manifest=sealed.manifest,
            outgoing=self._outgoing(item.stream, item.kind, sealed, peer),
            sent_at=now,
            due=now + self._jittered(self.patience_s),
            wait_s=self.patience_s,
        )
        self._streams[item.stream] = current
        assert current.outgoing is not None
        frames = current.outgoing.start()
        if sum(s.size for s in self._streams.values() if s.outgoing) > LOADED_BYTES:
            current.outgoing = None
        self._send(current, frames)

    def _sealed(self, item: Posted, peer: PublicIdentity) -> Sealed:
        if item.manifest and not self._outdated(item.manifest, peer):
            try:
                return reseal(item.message, item.manifest, item.file_key)
            except SealError:
                logger.warning("a kept seal does not fit its message; sealing it anew")
        now_s = int(self.now())
        sealed = seal(
            item.message,
            tenant=self.tenant,
            sender_id=self.me,
            recipient_id=item.to,
            kind=item.kind,
            task=item.task,
            stream=item.stream,
            sequence=item.sequence,
            created_s=now_s,
            expires_s=now_s + int(self.lifetime_s),
            sender=self.identity,
            recipient=peer,
        )
        self.mailbox.keep_seal(item.stream, sealed.manifest, sealed.file_key)
        return sealed

    def _outdated(self, manifest: bytes, peer: PublicIdentity) -> bool:
        header = peek_header(manifest)
        keys = (header.recipient_key, header.sender_key)
        return keys != (peer.receive_id, self.identity.public.sign_id)

    def _outgoing(self, stream: bytes, kind: str, sealed: Sealed, peer: PublicIdentity) -> Outgoing:
        keys = self._keys(kind)
        return Outgoing(stream, sealed, peer, keys=keys, window_bytes=self.window_bytes)

    def _keys(self, kind: str) -> bytes:
        return self.identity.public.to_bytes() if kind == "Enrol" else b""

    def _load(self, current: _Stream) -> Outgoing | None:
        item = self.mailbox.posted(current.stream)
        peer = self.lookup(current.to)
        if item is None or peer is None:
            self._end(current)
            return None
        sealed = self._sealed(item, peer)
        if self.ledger is not None:
            self.ledger.begin(item, sealed.manifest)
        current.manifest = sealed.manifest
        current.outgoing = self._outgoing(current.stream, current.kind, sealed, peer)
        current.outgoing.start()
        return current.outgoing

    def _advance(self, current: _Stream, outgoing: Outgoing, frames: list[Frame]) -> None:
        if outgoing.acknowledged_chunks > current.acknowledged:
            current.acknowledged = outgoing.acknowledged_chunks
            # On a slow link answers take long; patience follows what was seen.
            seen_s = 4 * (self.clock() - current.sent_at)
            current.wait_s = max(self.patience_s, min(current.wait_s, seen_s))
            current.quiet = 0
            self._report(current, min(current.size, current.acknowledged * CHUNK_BYTES))
        current.due = self.clock() + self._jittered(current.wait_s)
        if frames:
            self._send(current, frames)

    def _again(self, current: _Stream) -> None:
        current.quiet += 1
        current.wait_s = min(LONGEST_WAIT_S, 2 * current.wait_s)
        peer = self.lookup(current.to)
        if peer is None:
            self._end(current)  # its keys are gone; refill asks again
            return
        if self._outdated(current.manifest, peer):
            self._load(current)  # the peer or we have new keys: seal with those
        if current.outgoing is not None and current.quiet <= _IDLE_RESENDS:
            frames = current.outgoing.resend()
        else:
            current.outgoing = None
            keys = self._keys(current.kind)
            frames = [Offer(current.stream, current.manifest, keys)]
        self._send(current, frames)

    def _send(self, current: _Stream, frames: list[Frame]) -> None:
        for frame in frames:
            data = encode_frame(frame)
            if len(data) > self.link.max_payload:
                reason = (
                    f"a frame of {len(data)} bytes is over the broker's limit of "
                    f"{self.link.max_payload}; raise the broker's limit and send it again"
                )
                self._park(current, reason)
                return
            if not self.publish(current.to, current.kind, data):
                break
            if self.ledger is not None:
                self.ledger.count(current.stream, len(data))
        current.sent_at = self.clock()
        current.due = current.sent_at + self._jittered(current.wait_s)

    def _rejected(self, current: _Stream, reject: Reject) -> None:
        peer = self.lookup(current.to)
        better = peer is not None and self._outdated(current.manifest, peer)
        changing = better or self.ring.coming is not None
        unknown = reject.refusal is Refusal.UNKNOWN_SENDER
        if reject.refusal is Refusal.WRONG_KEY or (unknown and changing):
            # Sealed with keys that one side has retired: `_again` seals anew, at once if we know
            # the new ones already.
            current.outgoing = None
            current.due = self.clock() + (0.0 if better else self._jittered(current.wait_s))
            return
        self._park(current, reject.reason)

    def _park(self, current: _Stream, reason: str) -> None:
        logger.warning("%s to %s was set aside: %s", current.kind, current.to[:12], reason)
        with self.mailbox.transaction():
            self.mailbox.park(current.stream, reason)
            self._note_end(current, refused=reason)
        self._settle(current)

    def _note_end(self, current: _Stream, *, refused: str = "") -> None:
        if self.ledger is not None:
            self.ledger.end(current.stream, refused=refused)

    def _settle(self, current: _Stream) -> None:
        self._end(current)
        self._peers.pop(current.stream, None)
        if self.ledger is not None:
            self.ledger.forget(current.stream)
        self.settled(current.stream)

    def _end(self, current: _Stream) -> None:
        self._streams.pop(current.stream, None)

    def _report(self, current: _Stream, done_bytes: int) -> None:
        self.progress(
            Progress(current.stream, current.to, current.kind, True, done_bytes, current.size)
        )

    def _jittered(self, wait_s: float) -> float:
        return wait_s * self.rng.uniform(0.75, 1.25)
