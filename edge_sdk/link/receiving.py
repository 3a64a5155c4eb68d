"""The incoming half of the courier: who offers what, what is missing, and when it is accepted.

Knows the mailbox, the senders' public keys and the two hooks of the application. Does not know
topics, threads or brokers: it is driven by the courier's worker, frame by frame.

The rules, in the order they are checked (PROTOCOL.md 1.3, 1.4, 5.4):

1. the topic names the peer; the broker let nobody else write there;
2. the peer is enrolled and not revoked, or the message is an Enrol that brings its own keys;
3. the manifest is signed by that peer and addressed to us, under a key we have (WRONG_KEY lets
   the sender seal anew, with nothing lost, when either side has changed keys);
4. a stream that was accepted before is answered with Done and nothing else;
5. it waits for its turn if too much is on its way already (arriving.py);
6. chunks are checked against the manifest and opened as they come;
7. the whole message decodes, and is what its header says;
8. replay window, the application's hook and the letter are committed in one transaction, which
   messages that became complete together share;
9. only then Done.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edge_sdk.errors import EnrolmentError, RemoteProtocolError, SealError, StorageError
from edge_sdk.link.arriving import TURN_WAIT_S, Arriving, Transfer
from edge_sdk.link.passwords import COORDINATOR
from edge_sdk.link.sending import Progress
from edge_sdk.store.keyring import Keyring, OneKey
from edge_sdk.store.mailbox import Acceptance, Mailbox, Partial
from edge_sdk.wire.messages import MAX_MESSAGE_BYTES, AnyMessage, Enrol, decode
from edge_sdk.wire.seal import (
    CHUNK_BYTES,
    Header,
    Identity,
    Manifest,
    PublicIdentity,
    manifest_digest,
    peek_header,
    read_manifest,
)
from edge_sdk.wire.transfer import (
    Chunk,
    Frame,
    Offer,
    Refusal,
    Slow,
    encode_frame,
    sign_done,
    sign_reject,
)

logger = logging.getLogger(__name__)

MAX_ENROL_BYTES = 32 * 1024
"""An Enrol comes from somebody we do not know; it is small, and nothing larger is kept for it."""
OTHER_BYTES = 64 * 1024
"""Most bytes of a kind that `limits` does not name."""
_REMEMBERED_REJECTS = 1024
_OTHER_KEY = "signed with another key than the one known of this sender; sign it again"
_RETIRED = "sealed for a key that is not in use here any more; seal it again"

Accept = Callable[[Header, AnyMessage], None]
"""The application's part of accepting a message, inside the mailbox's transaction."""
Admit = Callable[[Enrol, PublicIdentity], None]
"""The coordinator's decision on an Enrol; raises EnrolmentError to refuse."""


Refused = Callable[[Header, Refusal, str], None]
"""Told of a message that its sender signed and that is malformed; never of what may be honest."""

_FAULTS = (Refusal.TOO_LARGE, Refusal.UNREADABLE, Refusal.NOT_UNDERSTOOD)


@dataclass(frozen=True, slots=True)
class _Verdict:
    transfer: Transfer
    refusal: Refusal | None
    reason: str


@dataclass(slots=True)
class Receiver:
    """Takes what peers offer and answers it."""

    mailbox: Mailbox
    ring: Keyring | OneKey
    tenant: str
    me: str
    lookup: Callable[[str], PublicIdentity | None]
    now: Callable[[], float]
    arriving: Arriving
    publish: Callable[[str, str, bytes], bool]
    arrived: Callable[[], None]
    """Called after letters were committed."""
    progress: Callable[[Progress], None]
    accept: Accept | None
    admit: Admit | None
    refused: Refused | None = None
    limits: Mapping[str, int] | None = None
    """Most bytes of a message by kind; a kind not named has OTHER_BYTES. None: no kind differs."""
    _ready: list[Transfer] = field(default_factory=list)
    _rejects: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)

    @property
    def identity(self) -> Identity:
        """The keys we sign with now."""
        return self.ring.identity

    def offer(self, peer: str, offer: Offer) -> str:
        """Answer an Offer with Want, Done or Reject; return the kind of message it is about.

        Raises:
            RemoteProtocolError: not a manifest, or not of this stream.
            StorageError: the mailbox cannot be read; the peer will offer again.
        """
        header = peek_header(offer.manifest)
        if header.stream != offer.stream:
            raise RemoteProtocolError("an Offer names another stream than its manifest")
        digest = manifest_digest(offer.manifest)
        if digest in self._rejects:
            self.publish(peer, header.kind, self._rejects[digest])
            return header.kind
        public = self._sender(peer, header.kind, offer.keys)
        if public is None and self.me != COORDINATOR:
            return header.kind  # our coordinator's keys are on their way; it will offer again
        if public is None:
            reason = "this sender is not enrolled here, or was revoked"
            self._reject(peer, header, digest, Refusal.UNKNOWN_SENDER, reason)
            return header.kind
        if header.sender_key != public.sign_id:
            self._reject(peer, header, digest, Refusal.UNKNOWN_SENDER, _OTHER_KEY)
            return header.kind
        try:
            manifest = read_manifest(
                offer.manifest,
                public,
                tenant=self.tenant,
                sender_id=peer,
                recipient_id=self.me,
            )
        except SealError as exc:
            self._reject(peer, header, digest, Refusal.UNREADABLE, str(exc))
            return header.kind
        self._believe(peer, manifest, public)
        return header.kind

    def chunk(self, peer: str, chunk: Chunk) -> str:
        """Keep one chunk; the message it completes waits for `commit`. Return its kind.

        Raises:
            RemoteProtocolError: not a chunk of the offered message.
            StorageError: no room; nothing was confirmed, the peer will offer again.
        """
        transfer = self.arriving.find(peer, chunk.stream)
        if transfer is None or transfer.incoming.complete:
            return "repeated"  # or we were restarted; the next Offer sorts it out
        header = transfer.manifest.header
        received = transfer.incoming.receive(chunk)
        if received.piece is not None:
            self.arriving.keep(transfer, chunk.index, received.piece)
            held = transfer.incoming.held_chunks
            if not received.complete:
                self._report(header, min(header.plaintext_bytes, held * CHUNK_BYTES))
        for frame in received.reply:
            self._answer(peer, header.kind, frame)
        if received.complete:
            self._ready.append(transfer)
        return header.kind

    @property
    def ready(self) -> int:
        """How many messages are complete and wait for `commit`."""
        return len(self._ready)

    def commit(self) -> None:
        """Accept what is complete, all in one transaction, and answer it; give others their turn.

        Raises:
            StorageError: nothing was accepted; the peers will offer again and lose nothing.
        """
        ready, self._ready = self._ready, []
        if ready:
            with self.mailbox.transaction():
                verdicts = [verdict for one in ready for verdict in self._judge(one)]
            for verdict in verdicts:
                self._conclude(verdict)
            if any(verdict.refusal is None for verdict in verdicts):
                self.arrived()
        for transfer in self.arriving.turns():
            self._answer(transfer.peer, transfer.kind, transfer.incoming.want())

    def forget(self, peer: str) -> None:
        """Drop what is half received from `peer` and every remembered refusal; it resumes later."""
        self.arriving.forget(peer)
        self._ready = [transfer for transfer in self._ready if transfer.peer != peer]
        self._rejects.clear()

    # --- steps ------------------------------------------------------------------------------

    def _sender(self, peer: str, kind: str, keys: bytes) -> PublicIdentity | None:
        if kind == "Enrol" and self.admit is not None:
            return PublicIdentity.from_bytes(keys)
        return self.lookup(peer)

    def _believe(self, peer: str, manifest: Manifest, public: PublicIdentity) -> None:
        header = manifest.header
        opener = self.ring.opener(header.recipient_key, header.suite)
        if opener is None:
            self._reject(peer, header, manifest.digest, Refusal.WRONG_KEY, _RETIRED)
            return
        if self.mailbox.accepted(header):
            self._answer(
                peer, header.kind, sign_done(header.stream, manifest.digest, self.identity)
            )
            return
        if header.expired(self.now()):
            reason = "it expired before it arrived; check both clocks, then send it again"
            self._reject(peer, header, manifest.digest, Refusal.EXPIRED, reason)
            return
        limit = self._limit(header.kind)
        if header.plaintext_bytes > limit:
            reason = f"{header.plaintext_bytes} bytes are over the limit of {limit}"
            self._fault(header, Refusal.TOO_LARGE, reason)
            self._reject(peer, header, manifest.digest, Refusal.TOO_LARGE, reason)
            return
        try:
            transfer = self.arriving.expect(peer, manifest, public, opener, max_bytes=limit)
        except SealError as exc:
            self._fault(header, Refusal.UNREADABLE, str(exc))
            self._reject(peer, header, manifest.digest, Refusal.UNREADABLE, str(exc))
            return
        if transfer is None:
            self._answer(peer, header.kind, Slow(header.stream, TURN_WAIT_S))
        elif not transfer.incoming.complete:
            self._answer(peer, header.kind, transfer.incoming.want())
        elif transfer not in self._ready:
            self._ready.append(transfer)

    # --- the end of a transfer ----------------------------------------------------------------

    def _judge(self, transfer: Transfer) -> list[_Verdict]:
        """Accept one message or say why not, within the transaction; nothing if it must wait."""
        try:
            with self.mailbox.transaction():
                refusal, reason = self._take_in(transfer)
        except StorageError as exc:
            logger.warning("a message of %s waits: %s", transfer.peer[:12], exc)
            return []
        except RemoteProtocolError as exc:
            refusal, reason = Refusal.REPEATED, str(exc)
        except EnrolmentError as exc:
            refusal, reason = Refusal.ENROLMENT, str(exc)
        except Exception:  # of the application's hook; the others of this transaction go on
            logger.exception("accepting a message of %s failed unexpectedly", transfer.peer[:12])
            return []
        return [_Verdict(transfer, refusal, reason)]

    def _take_in(self, transfer: Transfer) -> tuple[Refusal | None, str]:
        header = transfer.manifest.header
        if header.kind != "Enrol":
            known = self.lookup(transfer.peer)
            if known is None:
                return Refusal.UNKNOWN_SENDER, "this sender was revoked"
            if known.sign != transfer.public.sign:
                return Refusal.UNKNOWN_SENDER, _OTHER_KEY
        if self.ring.opener(header.recipient_key, header.suite) is None:
            return Refusal.WRONG_KEY, _RETIRED  # its time ended while the chunks came
        body = transfer.body()
        try:
            message = decode(body.read() if isinstance(body, Partial) else body)
            _check_kind(message, header, transfer.public)
        except RemoteProtocolError as exc:
            return Refusal.NOT_UNDERSTOOD, str(exc)
        self._store(header, message, body, transfer.public)
        return None, ""

    def _conclude(self, verdict: _Verdict) -> None:
        transfer, header = verdict.transfer, verdict.transfer.manifest.header
        self.arriving.end(transfer)
        digest = transfer.manifest.digest
        if verdict.refusal is not None:
            self.mailbox.drop_partial(header.stream)
            self._fault(header, verdict.refusal, verdict.reason)
            self._reject(transfer.peer, header, digest, verdict.refusal, verdict.reason)
            return
        self._report(header, header.plaintext_bytes)
        done = sign_done(header.stream, digest, self.identity)
        self._answer(transfer.peer, header.kind, done)

    def _store(
        self, header: Header, message: AnyMessage, body: bytes | Partial, public: PublicIdentity
    ) -> None:
        if self.mailbox.accept(header, body) is not Acceptance.NEW:
            return
        if isinstance(message, Enrol):
            if self.admit is None:
                raise EnrolmentError("only a coordinator enrols devices")
            whole = PublicIdentity.from_bytes(public.to_bytes() + message.hybrid_key)
            self.admit(message, whole)
        if self.accept is not None:
            self.accept(header, message)

    def _limit(self, kind: str) -> int:
        if kind == "Enrol":
            return MAX_ENROL_BYTES
        return MAX_MESSAGE_BYTES if self.limits is None else self.limits.get(kind, OTHER_BYTES)

    def _fault(self, header: Header, refusal: Refusal, reason: str) -> None:
        if self.refused is not None and refusal in _FAULTS and header.kind != "Enrol":
            self.refused(header, refusal, reason)

    def _reject(
        self, peer: str, header: Header, digest: bytes, refusal: Refusal, reason: str
    ) -> None:
        logger.warning("refused %s of %s: %s", header.kind, peer[:12], reason)
        frame = encode_frame(sign_reject(header.stream, digest, refusal, reason, self.identity))
        if refusal not in (Refusal.UNKNOWN_SENDER, Refusal.WRONG_KEY):  # these two can change
            self._rejects[digest] = frame
            while len(self._rejects) > _REMEMBERED_REJECTS:
                self._rejects.popitem(last=False)
        self.publish(peer, header.kind, frame)

    def _answer(self, peer: str, kind: str, frame: Frame) -> None:
        self.publish(peer, kind, encode_frame(frame))

    def _report(self, header: Header, done_bytes: int) -> None:
        self.progress(
            Progress(
                header.stream, header.sender, header.kind, False, done_bytes, header.plaintext_bytes
            )
        )


def _check_kind(message: AnyMessage, header: Header, public: PublicIdentity) -> None:
    if type(message).__name__ != header.kind:
        raise RemoteProtocolError(
            f"the header announces a {header.kind}, inside is a {type(message).__name__}"
        )
    if isinstance(message, Enrol):
        keys = (message.identity_key, message.receive_key)
        if message.device != header.sender or keys != (public.sign, public.receive):
            raise RemoteProtocolError("the Enrol speaks for another device or for other keys")
