"""Messages on their way in: where their pieces are kept, and whose turn it is.

Knows memory, partial files and how much may be on its way at once. Does not know frames, keys of
peers or when a message is accepted: receiving.py asks and decides.

A message of up to a window is kept in memory, since a crash then costs one window at most; a larger
one, or any when memory is short, goes to a file that no fsync waits for. Whoever resumes compares
the file with the signed hashes, so what a crash tore is asked for again and nothing else.

A receiver that lets everybody send at once makes the broker drop. So senders get turns: those
beyond the budget are told to wait, and get their Want when others are done.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_sdk.store.mailbox import Mailbox, Partial
from edge_sdk.wire.seal import CHUNK_BYTES, Identity, Manifest, Opener, PublicIdentity
from edge_sdk.wire.transfer import WINDOW_BYTES, Incoming

TURN_BYTES = 6 * 1024 * 1024
"""What all senders together may have on its way to us: a fifth of our brokers' queues.
More would only wait there, and each acknowledgement with it."""
TURN_WAIT_S = 10
"""What a sender is told to wait for its turn before it asks again; it is called when it comes."""
MEMORY_BYTES = 64 * 1024 * 1024
"""What is kept in memory of all messages together."""
_STALE_S = 5.0  # a turn that is not used ends after so long; what came late is taken all the same
_STREAMS_PER_PEER = 8  # the one that moved longest ago is dropped, and resumes later
_WAITING = 4096  # senders that are remembered in the order they came; others ask again
_WAITING_S = 60.0  # and for so long


@dataclass(slots=True, eq=False)
class Transfer:
    """One message that is arriving. `partial` is its file; None while it is in memory."""

    peer: str
    manifest: Manifest
    public: PublicIdentity
    incoming: Incoming
    partial: Partial | None
    turn: int
    moved_at: float
    pieces: dict[int, bytes] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of message, by its header."""
        return self.manifest.header.kind

    @property
    def size(self) -> int:
        """The size of the message in bytes."""
        return self.manifest.header.plaintext_bytes

    def body(self) -> bytes | Partial:
        """All of a complete message."""
        if self.partial is not None:
            return self.partial
        return b"".join(self.pieces[index] for index in range(len(self.pieces)))


@dataclass(frozen=True, slots=True)
class _Waiting:
    manifest: Manifest
    public: PublicIdentity
    opener: Opener
    max_bytes: int
    since: float


_Key = tuple[str, bytes]


class Arriving:
    """What is on its way in, by peer and stream. For the courier's worker thread only."""

    def __init__(
        self, mailbox: Mailbox, clock: Callable[[], float], *, turn_bytes: int = TURN_BYTES
    ) -> None:
        self._mailbox = mailbox
        self._clock = clock
        self._turn_bytes = turn_bytes
        self._transfers: OrderedDict[_Key, Transfer] = OrderedDict()
        self._waiting: OrderedDict[_Key, _Waiting] = OrderedDict()
        self._in_memory = 0
        self._given = 0  # bytes of turns in use

    def find(self, peer: str, stream: bytes) -> Transfer | None:
        """Return the transfer that a chunk belongs to."""
        return self._transfers.get((peer, stream))

    def expect(
        self,
        peer: str,
        manifest: Manifest,
        public: PublicIdentity,
        opener: Identity,
        *,
        max_bytes: int,
    ) -> Transfer | None:
        """Return the transfer to ask for, new or resumed; None if it must wait for its turn.

        Raises:
            SealError: the message is sealed to another key than `opener`.
            StorageError: there is no room for it.
        """
        key = (peer, manifest.header.stream)
        known = self._transfers.get(key)
        if known is not None and known.manifest.digest == manifest.digest:
            self._use_turn(known)
            return known
        if known is not None:
            self.end(known)
        wish = _Waiting(manifest, public, Opener(manifest, opener), max_bytes, self._clock())
        self._end_stale_turns()
        if self._waiting or self._given + self._turn_of(manifest) > self._turn_bytes:
            if key in self._waiting or len(self._waiting) < _WAITING:
                self._waiting[key] = wish  # who asks again keeps the place in the line
            return None
        return self._begin(peer, wish)

    def turns(self) -> list[Transfer]:
        """Return the transfers of those who waited and whose turn it is now."""
        begun: list[Transfer] = []
        while self._waiting:
            key, wish = next(iter(self._waiting.items()))
            if self._given + self._turn_of(wish.manifest) > self._turn_bytes:
                self._end_stale_turns()
                if self._given + self._turn_of(wish.manifest) > self._turn_bytes:
                    break
            del self._waiting[key]
            if self._clock() - wish.since < _WAITING_S:
                begun.append(self._begin(key[0], wish))
        return [transfer for transfer in begun if not transfer.incoming.complete]

    def keep(self, transfer: Transfer, index: int, piece: bytes) -> None:
        """Keep a piece of the message.

        Raises:
            StorageError: the disk refuses; the transfer is forgotten and resumes later.
        """
        self._use_turn(transfer)
        if transfer.partial is None:
            transfer.pieces[index] = piece
            self._in_memory += len(piece)
            return
        try:
            transfer.partial.write(index * CHUNK_BYTES, piece)
        except Exception:
            self.end(transfer)  # it believes that the piece is kept
            raise

    def end(self, transfer: Transfer) -> None:
        """Forget a transfer; what is in its file stays there."""
        key = (transfer.peer, transfer.manifest.header.stream)
        if self._transfers.get(key) is not transfer:
            return
        del self._transfers[key]
        self._given -= transfer.turn
        self._in_memory -= sum(map(len, transfer.pieces.values()))
        transfer.turn = 0

    def forget(self, peer: str) -> None:
        """Forget all transfers of `peer`."""
        for transfer in [one for one in self._transfers.values() if one.peer == peer]:
            self.end(transfer)
        for key in [key for key in self._waiting if key[0] == peer]:
            del self._waiting[key]

    # --- steps ------------------------------------------------------------------------------

    def _begin(self, peer: str, wish: _Waiting) -> Transfer:
        header = wish.manifest.header
        partial = None
        if header.plaintext_bytes > min(WINDOW_BYTES, MEMORY_BYTES - self._in_memory):
            digest = wish.manifest.digest
            partial = self._mailbox.partial(header.stream, digest, header.plaintext_bytes)
        held = _held(partial, wish.opener, header.chunks) if partial is not None else []
        incoming = Incoming(wish.manifest, wish.opener, held, max_bytes=wish.max_bytes)
        mine = [one for one in self._transfers.values() if one.peer == peer]
        if len(mine) >= _STREAMS_PER_PEER:
            self.end(min(mine, key=lambda one: one.moved_at))
        transfer = Transfer(peer, wish.manifest, wish.public, incoming, partial, 0, self._clock())
        self._transfers[peer, header.stream] = transfer
        self._use_turn(transfer)
        return transfer

    def _use_turn(self, transfer: Transfer) -> None:
        transfer.moved_at = self._clock()
        if transfer.turn == 0:
            transfer.turn = self._turn_of(transfer.manifest)
            self._given += transfer.turn

    def _end_stale_turns(self) -> None:
        now = self._clock()
        for transfer in self._transfers.values():
            if transfer.turn and now - transfer.moved_at > _STALE_S:
                self._given -= transfer.turn
                transfer.turn = 0

    @staticmethod
    def _turn_of(manifest: Manifest) -> int:
        return max(1, min(WINDOW_BYTES, manifest.header.plaintext_bytes))


def _held(partial: Partial, opener: Opener, chunks: int) -> list[int]:
    """Which pieces a file of an earlier process holds, judged by the signed hashes alone."""
    reach = -(-partial.held_bytes // CHUNK_BYTES)
    return [
        index
        for index in range(min(chunks, reach))
        if opener.holds(index, partial.piece(index * CHUNK_BYTES, CHUNK_BYTES))
    ]
