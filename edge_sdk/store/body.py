"""The bytes of a message, in a row, in a file of ours or of somebody else, read in pieces.

Knows where they are. Does not know how they are stored, encrypted or sent.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import StorageError
from edge_sdk.store.bodies import Bodies


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a file that never changes, such as a published model: sent without a copy."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Body:
    """The bytes of a message, wherever they are: `head` in memory, then part of a file."""

    head: bytes
    size: int
    _files: Bodies | None = None
    _file: str = ""
    _offset: int = 0

    @property
    def place(self) -> tuple[int, bytes, str, int]:
        """What two bodies of the same bytes have alike: size, hash of the head, file and offset."""
        return self.size, hashlib.sha256(self.head).digest(), self._file, self._offset

    @property
    def there(self) -> bool:
        """Whether its file, if it has one, still has all of it."""
        rest = self.size - len(self.head)
        return (
            self._files is None
            or rest <= 0
            or (self._files.size(self._file) >= self._offset + rest)
        )

    def piece(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`.

        Raises:
            StorageError: the file is gone or cannot be read.
        """
        end = min(offset + size, self.size)
        inside = self.head[offset:end]
        wanted = end - offset - len(inside)
        if wanted <= 0:
            return inside
        assert self._files is not None
        at = self._offset + offset + len(inside) - len(self.head)
        rest = self._files.read(self._file, at, wanted)
        if len(rest) != wanted:
            raise StorageError(f"{self._file} became shorter while it was being sent")
        return inside + rest if inside else rest

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield all of it in pieces of `size`; an empty body is one empty piece.

        Raises:
            StorageError: the file is gone or cannot be read.
        """
        for offset in range(0, max(1, self.size), size):
            yield self.piece(offset, size)

    def read(self) -> bytes:
        """Return all of it.

        Raises:
            StorageError: the file is gone or cannot be read.
        """
        return self.piece(0, self.size)


@dataclass(frozen=True, slots=True)
class Posted:
    """A message in the outbox. `manifest` and `file_key` are empty until `keep_seal`.

    `parked` says in one sentence why it will not be sent; it is empty while it waits.
    """

    stream: bytes
    to: str
    kind: str
    task: str
    sequence: int
    manifest: bytes
    file_key: bytes
    parked: str
    body: Body

    @property
    def message(self) -> bytes:
        """All the bytes; empty when they were given up.

        Raises:
            StorageError: they cannot be read.
        """
        return self.body.read()
