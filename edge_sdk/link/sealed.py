"""The chunks of a message on its way out, each read and sealed when it is asked for.

Knows bodies, the outbox and a little memory for the small ones. Does not know frames or peers.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import overload

from edge_sdk.errors import SealError, StorageError
from edge_sdk.store.mailbox import Body, Mailbox, Posted
from edge_sdk.wire.seal import CHUNK_BYTES, Sealer

SHELF_BYTES = 32 * 1024 * 1024
"""Small messages kept in memory while they are sent; others are read again for each chunk."""


class Changed(Exception):  # noqa: N818 - what happened, not a fault of ours
    """The bytes of a message are not those that were sealed: it cannot be sent any more."""


class Shelf:
    """Bodies of messages that are being sent, by stream; those used longest ago leave first."""

    def __init__(self, mailbox: Mailbox, *, size_bytes: int = SHELF_BYTES) -> None:
        self._mailbox = mailbox
        self._size = size_bytes
        self._used = 0
        self._bodies: OrderedDict[bytes, Body] = OrderedDict()

    def put(self, stream: bytes, body: Body) -> None:
        """Keep `body` at hand."""
        self.drop(stream)
        self._bodies[stream] = body
        self._used += len(body.head)
        while self._used > self._size and len(self._bodies) > 1:
            self.drop(next(iter(self._bodies)))

    def get(self, stream: bytes) -> Body:
        """Return the body, from the outbox if it is not at hand.

        Raises:
            Changed: it is not in the outbox any more.
            StorageError: it cannot be read.
        """
        body = self._bodies.get(stream)
        if body is not None:
            self._bodies.move_to_end(stream)
            return body
        item = self._mailbox.posted(stream)
        if item is None:
            raise Changed("it left the outbox while it was being sent")
        self.put(stream, item.body)
        return item.body

    def drop(self, stream: bytes) -> None:
        """Let go of a body."""
        body = self._bodies.pop(stream, None)
        if body is not None:
            self._used -= len(body.head)


class SealedBody(Sequence[bytes]):
    """A sealed message as `Outgoing` wants it; `chunks` is itself."""

    def __init__(self, manifest: bytes, sealer: Sealer, shelf: Shelf, item: Posted) -> None:
        self.manifest = manifest
        self._sealer = sealer
        self._shelf = shelf
        self._stream = item.stream
        shelf.put(item.stream, item.body)

    @property
    def chunks(self) -> Sequence[bytes]:
        """The encrypted chunks."""
        return self

    def __len__(self) -> int:
        return self._sealer.header.chunks

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        """Return one encrypted chunk.

        Raises:
            Changed: the message is gone or is not the one that was sealed.
            StorageError: it cannot be read now.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        body = self._shelf.get(self._stream)
        try:
            return self._sealer.chunk(index, body.piece(index * CHUNK_BYTES, CHUNK_BYTES))
        except SealError as exc:
            raise Changed("its file changed while it was being sent; publish it again") from exc
        except StorageError as exc:
            if body.there:
                raise
            raise Changed("its file is gone or shorter; publish it again") from exc
