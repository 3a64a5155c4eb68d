"""The outgoing half of the courier: what is on its way, to whom, and when to try again.

Knows the outbox, patience and how many transfers run at once. Does not know topics, threads or
brokers: it is driven by the courier's worker with frames and ticks, and publishes through it.

Nothing here has to survive: the outbox remembers each message and how it was sealed, the receiver
remembers which chunks it has, and an Offer asks for the rest. No whole message is held in memory:
each chunk is read and sealed when it is sent (sealed.py).
"""

import logging
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_sdk.errors import SealError, StorageError
from edge_sdk.link.base import Link
from edge_sdk.link.sealed import Changed, SealedBody, Shelf
from edge_sdk.store.keyring import Keyring, OneKey
from edge_sdk.store.ledger import Ledger
from edge_sdk.store.mailbox import Mailbox, Posted
from edge_sdk.wire.seal import (
    CHUNK_BYTES,
    Identity,
    PublicIdentity,
    Sealer,
    peek_header,
)
from edge_sdk.wire.transfer import (
    KEYS_BYTES,
    Answer,
    Frame,
    Offer,
    Outgoing,
    Refusal,
    Reject,
    Slow,
    Want,
    encode_frame,
)

logger = logging.getLogger(__name__)

STREAMS_PER_PEER = 4
"""Transfers to one peer at a time; more would only share the same link."""
LONGEST_WAIT_S = 300.0
LONGEST_SLOW_S = 60
"""A Slow is not signed: whoever forges one delays a message by no more than this."""
_DOUBT_S = 10.0  # until a message that seemed too large is offered again
_DEAF = 3  # after so many Offers without an answer, perhaps nobody can answer us
_MOST_REFUSALS = 5
_STUCK = 4
_BATCH = 64  # messages begun in one transaction
_BATCH_BYTES = 8 * 1024 * 1024  # or so many bytes, since sealing keeps others from the mailbox
_BODIES = 8  # messages whose seal is remembered for the next peer; half a MiB each at most
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
    refusals: int = 0
    wants: int = 0
    """Answers to our Offers since the last progress."""


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
    _finished: dict[bytes, _Stream] = field(default_factory=dict)
    _bodies: OrderedDict[object, Sealer] = field(default_factory=OrderedDict)
    _shelf: Shelf = field(init=False)
    _peers: dict[bytes, str] = field(default_factory=dict)
    _gone: deque[str] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._shelf = Shelf(self.mailbox)

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
            if current.wants < _STUCK:  # what gets nowhere keeps nobody waiting
                busy[current.to] = busy.get(current.to, 0) + 1
        while pending:
            with self.mailbox.transaction():  # what was sealed how is kept before anything leaves
                begun = self._begin_some(pending, busy)
            for current in begun:
                assert current.outgoing is not None
                self._streams[current.stream] = current
                self._send(current, current.outgoing.start())

    def _begin_some(self, pending: list[bytes], busy: dict[str, int]) -> list[_Stream]:
        begun: list[_Stream] = []
        size = 0
        while pending and len(begun) < _BATCH and size < _BATCH_BYTES:
            stream = pending.pop(0)
            known = self._peers.get(stream)
            if stream in self._streams or stream in self._finished:
                continue
            if busy.get(known or "", 0) >= STREAMS_PER_PEER:
                continue
            item = self.mailbox.posted(stream)
            if item is None:
                continue
            self._peers[stream] = item.to
            peer = self.lookup(item.to)
            if peer is None or busy.get(item.to, 0) >= STREAMS_PER_PEER:
                continue  # a peer whose keys we do not know yet; asked again at the next refill
            current = self._begin(item, peer)
            if current is not None:
                busy[item.to] = busy.get(item.to, 0) + 1
                size += current.size
                begun.append(current)
        return begun

    def take(self, peer: str, frame: Answer) -> str:
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
        try:
            frames = outgoing.receive(frame)
        except Changed as exc:
            self._park(current, str(exc))
            return current.kind
        if outgoing.done:
            self._finished[current.stream] = current
            self._end(current)
        elif outgoing.rejected is not None:
            self._rejected(current, outgoing.rejected)
        elif isinstance(frame, Slow):
            self._hold(current, frame.wait_s)
        else:
            current.wants += isinstance(frame, Want)
            self._advance(current, outgoing, frames)
        return current.kind

    def commit(self) -> None:
        """Forget what the receivers confirmed, all in one transaction.

        A crash before this costs an Offer that is answered with the same Done.

        Raises:
            StorageError: the disk refuses; tried again at the next turn.
        """
        if not self._finished:
            return
        with self.mailbox.transaction():
            for current in self._finished.values():
                self.mailbox.mark_done(current.stream)
                self._note_end(current)
        finished, self._finished = self._finished, {}
        for current in finished.values():
            self._report(current, current.size)
            self._settle(current)

    def give_up(self, streams: list[bytes]) -> None:
        """Stop sending what the outbox has given up."""
        for stream in streams:
            current = self._streams.get(stream)
            if current is not None:
                self._end(current)
            self.settled(stream)

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
        """When `tick` or `commit` has something to do, on the courier's clock."""
        if self._finished:
            return self.clock() + self.patience_s
        return min((s.due for s in self._streams.values()), default=None)

    # --- one stream -------------------------------------------------------------------------

    def _begin(self, item: Posted, peer: PublicIdentity) -> _Stream | None:
        if not item.body.there:
            reason = "a file that was to be sent is gone or shorter; publish it again"
            self.mailbox.park(item.stream, reason)
            self.settled(item.stream)
            return None
        now = self.clock()
        current = _Stream(
            stream=item.stream,
            to=item.to,
            kind=item.kind,
            size=item.body.size,
            manifest=b"",
            outgoing=None,
            sent_at=now,
            due=now + self._jittered(self.patience_s),
            wait_s=self.patience_s,
        )
        self._seal(current, item, peer)
        return current

    def _seal(self, current: _Stream, item: Posted, peer: PublicIdentity) -> Outgoing:
        """Seal the message, or take up the seal it has; note what will leave."""
        manifest, file_key = item.manifest, item.file_key
        if not manifest or self._outdated(manifest, peer):
            manifest, file_key = self._sealed(item, peer)
        if self.ledger is not None:
            self.ledger.begin(item, manifest)
        current.manifest = manifest
        body = SealedBody(manifest, Sealer.again(manifest, file_key), self._shelf, item)
        keys, window = self._keys(current.kind), self.window_bytes
        current.outgoing = Outgoing(item.stream, body, peer, keys=keys, window_bytes=window)
        return current.outgoing

    def _sealed(self, item: Posted, peer: PublicIdentity) -> tuple[bytes, bytes]:
        now_s = int(self.now())
        # One message to many is encrypted once: each peer gets a wrap and a signature of its own.
        place = (item.kind, item.task, self.identity.public.sign_id, *item.body.place)
        known = self._bodies.get(place)
        sealer = Sealer.begin(
            item.body.size,
            tenant=self.tenant,
            sender_id=self.me,
            recipient_id=item.to,
            kind=item.kind,
            task=item.task,
            stream=item.stream,
            sequence=item.sequence,
            created_s=now_s,
            expires_s=now_s + int(self.lifetime_s),
            sender=self.identity.public,
            recipient=peer,
            body=known,
        )
        if known is None:
            for index, piece in enumerate(item.body.pieces(CHUNK_BYTES)):
                sealer.chunk(index, piece)
            self._bodies[place] = sealer
            if len(self._bodies) > _BODIES:
                self._bodies.popitem(last=False)
        manifest = sealer.manifest(self.identity)
        self.mailbox.keep_seal(item.stream, manifest, sealer.file_key)
        return manifest, sealer.file_key

    def _outdated(self, manifest: bytes, peer: PublicIdentity) -> bool:
        header = peek_header(manifest)
        keys = (header.recipient_key, header.sender_key)
        return keys != (peer.receive_id, self.identity.public.sign_id)

    def _keys(self, kind: str) -> bytes:
        # The hybrid key is not needed to check the signature; it comes inside the sealed Enrol.
        return self.identity.public.to_bytes()[:KEYS_BYTES] if kind == "Enrol" else b""

    def _load(self, current: _Stream) -> Outgoing | None:
        item = self.mailbox.posted(current.stream)
        peer = self.lookup(current.to)
        if item is None or peer is None:
            self._end(current)
            return None
        try:
            with self.mailbox.transaction():
                return self._seal(current, item, peer)
        except (SealError, StorageError) as exc:
            if not isinstance(exc, SealError) and item.body.there:
                raise  # the disk; tried again
            self._park(current, f"its file changed while it waited ({exc}); publish it again")
            return None

    def _hold(self, current: _Stream, wait_s: int) -> None:
        current.quiet = 0
        wait = min(max(wait_s, self.patience_s), LONGEST_SLOW_S)
        current.due = self.clock() + self._jittered(wait)

    def _advance(self, current: _Stream, outgoing: Outgoing, frames: list[Frame]) -> None:
        if outgoing.acknowledged_chunks > current.acknowledged:
            current.acknowledged = outgoing.acknowledged_chunks
            # On a slow link answers take long; patience follows what was seen.
            seen_s = 4 * (self.clock() - current.sent_at)
            current.wait_s = max(self.patience_s, min(current.wait_s, seen_s))
            current.quiet = current.wants = current.refusals = 0
            self._report(current, min(current.size, current.acknowledged * CHUNK_BYTES))
        current.due = self.clock() + self._jittered(current.wait_s)
        if frames:
            self._send(current, frames)

    def _again(self, current: _Stream) -> None:
        current.quiet += 1
        if current.quiet % _DEAF == 0:
            self.link.refresh()
        current.wait_s = min(LONGEST_WAIT_S, 2 * current.wait_s)
        peer = self.lookup(current.to)
        if peer is None:
            self._end(current)  # its keys are gone; refill asks again
            return
        if self._outdated(current.manifest, peer):
            self._load(current)  # the peer or we have new keys: seal with those
        if current.stream not in self._streams:
            return  # parked by `_load`
        if current.outgoing is not None:
            self._send(current, current.outgoing.resend())
        else:
            keys = self._keys(current.kind)
            self._send(current, [Offer(current.stream, current.manifest, keys)])

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
            if len(data) > self.link.trusted_payload:
                text = "the broker seems to cut connections for messages that large"
                self._stall(current, text, _DOUBT_S)
                return
            if not self.publish(current.to, current.kind, data):
                break
            if self.ledger is not None:
                self.ledger.count(current.stream, len(data))
        current.sent_at = self.clock()
        current.due = current.sent_at + self._jittered(current.wait_s)

    def refused(self, stream: bytes, reason: str, too_large: bool) -> None:
        """The broker refused a frame of `stream`: no use to send it again, at least not soon."""
        current = self._streams.get(stream)
        if current is None:
            return
        current.refusals += 1
        if too_large or current.refusals >= _MOST_REFUSALS:
            self._park(current, f"the broker refused it: {reason}")
        else:
            self._stall(current, f"the broker refused it: {reason}", current.wait_s)

    def _stall(self, current: _Stream, reason: str, wait_s: float) -> None:
        logger.info("%s to %s waits: %s", current.kind, current.to[:12], reason)
        current.wants = _STUCK  # others may go before it
        current.wait_s = min(LONGEST_WAIT_S, 2 * wait_s)
        current.due = self.clock() + self._jittered(wait_s)
        self.settled(current.stream)

    def _rejected(self, current: _Stream, reject: Reject) -> None:
        # Asked in this order: the ring waits with its answer while it changes keys, so either the
        # change is still to come, or the manifest is seen to be outdated by it.
        changing = self.ring.coming is not None
        peer = self.lookup(current.to)
        better = peer is not None and self._outdated(current.manifest, peer)
        changing = changing or better
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
        self._shelf.drop(current.stream)

    def _report(self, current: _Stream, done_bytes: int) -> None:
        self.progress(
            Progress(current.stream, current.to, current.kind, True, done_bytes, current.size)
        )

    def _jittered(self, wait_s: float) -> float:
        return wait_s * self.rng.uniform(0.75, 1.25)
