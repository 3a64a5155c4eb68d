"""The courier: messages that are handed to it arrive exactly once, whatever the network does.

Knows topics, its one worker thread and what crossed the wire. Does not know what messages mean,
nor which broker carries them; sending.py and receiving.py hold the two halves of its work.

Both sides run the same class. A device writes `v1/<tenant>/<device>/up` and reads `.../down`; the
coordinator the other way round. An empty payload is a knock: "I am here, do not wait for your
timeout". The coordinator's keys are retained on `v1/<tenant>/coordinator/keys`.
"""

import logging
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import monotonic, time

from msgspec.structs import replace

from edge_sdk.errors import (
    EnrolmentError,
    FleetError,
    LinkError,
    LocalProtocolError,
    RemoteProtocolError,
    StorageError,
)
from edge_sdk.link.arriving import TURN_BYTES, Arriving
from edge_sdk.link.base import Link
from edge_sdk.link.calls import CALL, Calls
from edge_sdk.link.passwords import COORDINATOR
from edge_sdk.link.receiving import Accept, Admit, Receiver, Refused
from edge_sdk.link.sending import Progress, Sender
from edge_sdk.store.keyring import Keyring, OneKey
from edge_sdk.store.ledger import Ledger
from edge_sdk.store.mailbox import Mailbox, Slice
from edge_sdk.wire.messages import AnyMessage, Enrol, File, encode, file_head
from edge_sdk.wire.seal import Identity, PublicIdentity
from edge_sdk.wire.transfer import WINDOW_BYTES, Chunk, Offer, decode_frame

logger = logging.getLogger(__name__)

PIECE_BYTES = 4 * 1024 * 1024
"""A file above this travels in parts."""
PATIENCE_S = 1.5
"""Silence after which an Offer is repeated; doubles up to five minutes, or to what was seen."""
LIFETIME_S = 30 * 24 * 3600.0
"""How long after sealing a message may still be accepted: a device may be away for weeks."""

_RESCAN_S = 15.0  # look into the outbox even if nobody said that something is there
_INBOX_BYTES = 16 * 1024 * 1024
_PACKET_BYTES = 9  # MQTT's fixed header, topic length, packet id and property length
_TASK_BYTES = 128
_FRAMES = 64  # handled before the messages they complete are accepted, together
_TIDY_S = 600.0


class Courier:
    """Moves sealed messages between this party and its peers, durably and in the background.

    Args:
        link: how to reach the broker; `start` connects it and `close` closes it.
        mailbox: outbox and inbox; what `send` puts there outlives this process.
        identity: our private keys; a Keyring when they change over time.
        tenant: first part of our topics.
        me: our id; "coordinator" is the coordinator, any other a device.
        lookup: a peer's public keys now, or None for unknown and revoked peers.
        now: seconds since 1970, for expiry only.
        rng: for jitter.
        accept: called with header and message inside the transaction that accepts a message;
            raise StorageError to have it sent again later, RemoteProtocolError to refuse it.
        admit: on the coordinator, decides on an Enrol inside that same transaction.
        keys: on a device, called with the coordinator's retained key bundle (unverified bytes).
        progress: called often, from the worker thread.
        ledger: on a device, where each message is noted before it leaves.
        refused: on the coordinator, told of malformed messages that their sender signed.
        limits: on the coordinator, most bytes of a message by kind.
        clock: a monotonic clock; tests pass their own and call `step`.
    """

    def __init__(
        self,
        link: Link,
        mailbox: Mailbox,
        identity: Identity | Keyring | OneKey,
        *,
        tenant: str,
        me: str,
        lookup: Callable[[str], PublicIdentity | None],
        now: Callable[[], float],
        rng: random.Random,
        accept: Accept | None = None,
        admit: Admit | None = None,
        keys: Callable[[bytes], None] | None = None,
        progress: Callable[[Progress], None] | None = None,
        ledger: Ledger | None = None,
        refused: Refused | None = None,
        limits: Mapping[str, int] | None = None,
        clock: Callable[[], float] = monotonic,
        patience_s: float = PATIENCE_S,
        window_bytes: int = WINDOW_BYTES,
        turn_bytes: int = TURN_BYTES,
        lifetime_s: float = LIFETIME_S,
    ) -> None:
        self.mailbox = mailbox
        self.mail = threading.Condition()
        self.malformed: Counter[str] = Counter()
        self._arrivals = 0
        self._settlements = 0
        self._link = link
        self._tenant = tenant
        self._me = me
        self._coordinates = me == COORDINATOR
        self._keys = keys
        self._clock = clock
        self._progress = progress or _ignore
        self._bundle = b""
        self._sent: Counter[tuple[str, str]] = Counter()  # (peer, kind) -> bytes
        self._received: Counter[tuple[str, str]] = Counter()
        self._inbox: deque[tuple[str, bytes] | None] = deque()  # None: the link is up
        self._refusals: deque[tuple[bytes, str, bool]] = deque()
        self._inbox_bytes = 0
        self._stir = threading.Condition()
        self._stirred = False
        self._closing = False
        self._worker: threading.Thread | None = None
        self._next_scan = self._not_before = 0.0
        self._next_tidy = self._tidied_at = clock()
        ring = OneKey(identity) if isinstance(identity, Identity) else identity
        self._sender = Sender(
            mailbox=mailbox,
            ring=ring,
            tenant=tenant,
            me=me,
            lookup=lookup,
            now=now,
            clock=clock,
            rng=rng,
            link=link,
            publish=self._publish,
            settled=self._settled,
            progress=self._progress,
            patience_s=patience_s,
            window_bytes=window_bytes,
            lifetime_s=lifetime_s,
            ledger=ledger,
        )
        self._receiver = Receiver(
            mailbox=mailbox,
            ring=ring,
            tenant=tenant,
            me=me,
            lookup=lookup,
            now=now,
            arriving=Arriving(mailbox, clock, turn_bytes=turn_bytes),
            publish=self._publish,
            arrived=self._new_mail,
            progress=self._progress,
            accept=accept,
            admit=admit,
            refused=refused,
            limits=limits,
        )
        self.calls = Calls(
            self._publish,
            ring,
            tenant=tenant,
            me=me,
            lookup=lookup,
            now=now,
            note=ledger.called if ledger is not None else None,
        )
        if self._coordinates:
            link.subscribe(f"v1/{tenant}/+/up", self._on_message)
        else:
            link.subscribe(f"v1/{tenant}/{me}/down", self._on_message)
            link.subscribe(f"v1/{tenant}/{COORDINATOR}/keys", self._on_message)
        link.on_connect(self._on_connect)
        link.on_refused(self._on_refused)

    # --- for the application ----------------------------------------------------------------

    def start(self) -> None:
        """Connect the link and work in the background until `close`."""
        if self._worker is None:
            self._worker = threading.Thread(
                target=self._work, name=f"{self._me}-courier", daemon=True
            )
            self._worker.start()
            self._link.connect()

    def close(self) -> None:
        """Stop the worker and close the link; what is unfinished goes on after the next start."""
        with self._stir:
            self._closing = True
            self._stir.notify_all()
        self._link.close()
        self.calls.close()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

    def __enter__(self) -> "Courier":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, to: str, message: AnyMessage, *, task: str) -> bytes:
        """Store `message` for `to` and return its stream id; it is safe once this returns.

        A receiver takes one message of a kind per `task` and sender, and refuses a second; where
        one task needs several (`File`), give each its own (see `part`). Works without a link.

        Raises:
            LocalProtocolError: the message is too large, or sent to ourselves.
            StorageError: the outbox cannot take it.
        """
        if to == self._me:
            raise LocalProtocolError(f"{to} cannot send a message to itself")
        stream = self.mailbox.put(to, type(message).__name__, task, encode(message))
        self._sender.expect(stream, to)
        self.nudge()
        return stream

    def send_file(self, to: str, file: File, source: Path, *, task: str) -> int:
        """Store all of the file `source` for `to`, in `File` messages; return how many.

        `file` names task and path; its data come from `source`, which is not copied and must not
        change while it is sent. A large one goes in parts of PIECE_BYTES, so that neither side ever
        has more than a part in memory, and a device with a small disk uses up each as it comes.

        Raises:
            StorageError: the outbox cannot take it, or `source` cannot be read.
        """
        try:
            size = source.stat().st_size
        except OSError as exc:
            raise StorageError(f"{source}: {exc.strerror}; publish it again") from exc
        whole = size <= PIECE_BYTES
        offsets = range(0, max(1, size), PIECE_BYTES)
        with self.mailbox.transaction():
            for offset in offsets:
                length = min(PIECE_BYTES, size - offset)
                piece = replace(file, offset=offset, size=0 if whole else size)
                name = file.path if whole else f"{file.path}@{offset}"
                head, rest = file_head(piece, length), Slice(source, offset, length)
                stream = self.mailbox.put(to, "File", part(task, name), head, rest)
                self._sender.expect(stream, to)
        self.nudge()
        return len(offsets)

    def wait_until_done(self, stream: bytes, timeout_s: float) -> None:
        """Return once the receiver has confirmed `stream` as stored.

        Raises:
            EnrolmentError: it was an Enrol and was refused; the message says why.
            RemoteProtocolError: the receiver refused it for good.
            LinkError: neither happened in time; it stays in the outbox and is still sent.
        """
        deadline = self._clock() + timeout_s
        with self.mail:
            item = self.mailbox.posted(stream)
            while item is not None and not item.parked:
                seen = self._settlements
                left_s = deadline - self._clock()
                if not self.mail.wait_for(lambda: self._settlements != seen, left_s):  # noqa: B023
                    raise LinkError(
                        f"not confirmed within {timeout_s:.0f} s; is the other side running? "
                        "It stays in the outbox"
                    )
                item = self.mailbox.posted(stream)
        if item is None:
            return
        if item.kind == "Enrol":
            raise EnrolmentError(item.parked)
        raise RemoteProtocolError(f"{item.to} refused the {item.kind}: {item.parked}")

    def enrol(self, message: Enrol, *, timeout_s: float) -> None:
        """Send our keys and secret, and return once the coordinator has taken us in.

        May be called again after a LinkError, also in another process: the same Enrol goes on.

        Raises:
            EnrolmentError: the coordinator refused; the message says why.
            LinkError: no answer in time.
        """
        waiting = map(self.mailbox.posted, self.mailbox.pending(COORDINATOR))
        same = [
            item.stream for item in waiting if item is not None and item.message == encode(message)
        ]
        stream = same[0] if same else self.send(COORDINATOR, message, task=message.token_id)
        self.wait_until_done(stream, timeout_s)

    def wait_for_mail(self, timeout_s: float) -> bool:
        """Return True as soon as a letter is unread, False after `timeout_s` without one."""
        with self.mail:
            seen = self._arrivals
            if self.mailbox.unread():
                return True
            return self.mail.wait_for(lambda: self._arrivals != seen, timeout_s)

    def announce_keys(self, bundle: bytes) -> None:
        """On the coordinator: keep the signed key bundle retained on the broker from now on."""
        self._bundle = bundle
        with self._stir:
            self._inbox.append(None)
        self.nudge()

    def forget(self, peer: str) -> None:
        """Stop all transfers with a peer that was revoked or readmitted; forget its refusals."""
        self._receiver.forget(peer)
        self._sender.forget(peer)
        self.nudge()

    def nudge(self) -> None:
        """Look into the outbox now, and try peers again whose keys were unknown."""
        with self._stir:
            self._stirred = True
            self._stir.notify_all()

    @property
    def bytes_up(self) -> dict[str, int]:
        """Bytes on the wire towards the coordinator, by kind of message, headers included."""
        return _by_kind(self._received if self._coordinates else self._sent)

    @property
    def bytes_down(self) -> dict[str, int]:
        """Bytes on the wire towards devices, by kind of message, headers included."""
        return _by_kind(self._sent if self._coordinates else self._received)

    def bytes_of(self, peer: str) -> tuple[int, int]:
        """Bytes on the wire (up, down) between us and one peer."""
        sent = sum(n for (who, _), n in self._sent.copy().items() if who == peer)
        received = sum(n for (who, _), n in self._received.copy().items() if who == peer)
        return (received, sent) if self._coordinates else (sent, received)

    # --- the worker -------------------------------------------------------------------------

    def step(self) -> None:
        """One turn of the worker: all that arrived, what is due, what is new. For tests."""
        while self._inbox:
            self._take(_FRAMES)
            if self._receiver.ready:
                self._guarded("accepting", self._receiver.commit)
        self._guarded("accepting", self._receiver.commit)
        self._guarded("confirming", self._sender.commit)
        with self._stir:
            stirred, self._stirred = self._stirred, False
        if stirred or self._clock() >= self._next_scan:
            self._next_scan = self._clock() + _RESCAN_S
            self._guarded("reading the outbox", self._sender.refill)
        if self._clock() >= self._next_tidy:
            self._guarded("tidying up", self._tidy)
        while self._refusals:
            self._guarded("putting aside", partial(self._sender.refused, *self._refusals.popleft()))
        self._guarded("sending", self._sender.tick)

    def _take(self, frames: int) -> None:
        with self._stir:
            taken = [self._inbox.popleft() for _ in range(min(frames, len(self._inbox)))]
        for item in taken:
            if item is None:
                self._guarded("connecting", self._greet)
            else:
                self._handle(*item)
        with self._stir:
            self._inbox_bytes -= sum(len(item[1]) for item in taken if item)
            self._stir.notify_all()

    def _tidy(self) -> None:
        late = self._clock() - self._tidied_at
        self._tidied_at, self._next_tidy = self._clock(), self._clock() + _TIDY_S
        self.mailbox.tidy(time())
        self._sender.give_up(self.mailbox.wait_passes(late))

    def _work(self) -> None:
        while not self._closing:
            with self._stir:
                due = self._sender.next_due() if self._link.connected else None
                wake_at = self._next_scan if due is None else min(due, self._next_scan)
                wake_at = max(wake_at, self._not_before)
                self._stir.wait_for(
                    lambda: bool(self._inbox) or self._stirred or self._closing,
                    max(0.0, wake_at - self._clock()),
                )
            if not self._closing:
                self.step()

    def _guarded(self, doing: str, action: Callable[[], None]) -> None:
        try:
            action()
        except FleetError as exc:  # StorageError above all: try again at the next turn
            logger.warning("%s failed: %s", doing, exc)
            self._next_scan = min(self._next_scan, self._clock() + PATIENCE_S)
        except Exception:
            logger.exception("%s failed unexpectedly; the courier goes on", doing)
            self._not_before = self._clock() + PATIENCE_S  # or it would fail a thousand times a s

    def _greet(self) -> None:
        if not self._link.connected:
            return
        if self._coordinates:
            if self._bundle:
                topic = f"v1/{self._tenant}/{COORDINATOR}/keys"
                self._link.publish(topic, self._bundle, retain=True)
        else:
            self._link.publish(f"v1/{self._tenant}/{self._me}/up", b"")
        self._sender.wake()
        self._stirred = True

    # --- what arrives -----------------------------------------------------------------------

    def _on_connect(self) -> None:
        with self._stir:
            self._inbox.append(None)
            self._stir.notify_all()

    def _on_refused(self, _topic: str, head: bytes, reason: str, too_large: bool) -> None:
        self._refusals.append((head[1:], reason, too_large))
        self.nudge()

    def _on_message(self, topic: str, payload: bytes) -> None:
        if payload[:1] == bytes([CALL]):  # waits neither for the worker nor for its disk
            self._call(topic, payload)
            return
        with self._stir:
            if self._worker is not None:  # waiting here slows the broker down, as it should
                self._stir.wait_for(lambda: self._closing or self._inbox_bytes < _INBOX_BYTES)
            self._inbox.append((topic, payload))
            self._inbox_bytes += len(payload)
            self._stir.notify_all()

    def _call(self, topic: str, payload: bytes) -> None:
        levels = topic.split("/")
        if len(levels) == 4 and levels[3] in ("up", "down"):
            peer = levels[2] if self._coordinates else COORDINATOR
            self._received[peer, "calls"] += len(payload) + len(topic) + _PACKET_BYTES
            self.calls.receive(peer, payload)

    def _handle(self, topic: str, payload: bytes) -> None:
        levels = topic.split("/")
        if len(levels) != 4:
            return
        peer = levels[2] if self._coordinates else COORDINATOR
        try:
            if levels[3] == "keys":
                self._take_keys(payload)
            elif payload:
                self._frame(peer, payload, len(topic))
            else:
                self._sender.wake(peer)
        except FleetError as exc:
            self.malformed[peer] += 1
            logger.warning("a frame of %s was not taken: %s", peer[:12], exc)
        except Exception:
            logger.exception("a frame of %s failed unexpectedly; the courier goes on", peer[:12])

    def _take_keys(self, bundle: bytes) -> None:
        if self._keys is not None:
            self._keys(bundle)
        self._sender.wake(COORDINATOR)
        self._stirred = True

    def _frame(self, peer: str, payload: bytes, topic_bytes: int) -> None:
        frame = decode_frame(payload)
        if isinstance(frame, Offer):
            kind = self._receiver.offer(peer, frame)
        elif isinstance(frame, Chunk):
            kind = self._receiver.chunk(peer, frame)
        else:
            kind = self._sender.take(peer, frame)
        self._received[peer, kind] += len(payload) + topic_bytes + _PACKET_BYTES

    # --- what the two halves call -----------------------------------------------------------

    def _publish(self, peer: str, kind: str, data: bytes) -> bool:
        if self._coordinates:
            topic = f"v1/{self._tenant}/{peer}/down"
        else:
            topic = f"v1/{self._tenant}/{self._me}/up"
        try:
            self._link.publish(topic, data)
        except LinkError as exc:
            logger.info("%s to %s waits: %s", kind, peer[:12], exc)
            return False
        self._sent[peer, kind] += len(data) + len(topic) + _PACKET_BYTES
        return True

    def _settled(self, _stream: bytes) -> None:
        with self.mail:
            self._settlements += 1
            self.mail.notify_all()
        self.nudge()  # there is room for the next one

    def _new_mail(self) -> None:
        with self.mail:
            self._arrivals += 1
            self.mail.notify_all()


def part(task: str, name: str) -> str:
    """Return a task id for one of several messages of a task, told apart by `name`."""
    digest = sha256(name.encode()).hexdigest()[:16]
    return f"{task[: _TASK_BYTES - 17]}.{digest}"


def _by_kind(counter: Counter[tuple[str, str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for (_, kind), size in counter.copy().items():
        total[kind] += size
    return dict(total)


def _ignore(_progress: Progress) -> None:
    return None
