"""Message bodies in private files beside a store: written once, synced when asked, read in pieces.

Knows names, offsets, fsync and how much is there. Does not know which rows name a file, nor what is
in it: the mailbox decides what is kept.

A body that is still being received is written without fsync, because nothing is promised about it:
after a crash whoever resumes compares what is there with the signed hashes. `sync` comes before the
row that names the body, and a removal after the row is gone, so a row never names a missing file.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import StorageError


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the folder: its size in bytes and when it last changed, seconds since 1970."""

    name: str
    size: int
    changed_s: float


class Bodies:
    """The files in `folder`, which is made when the first one is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used_bytes = sum(found.size for found in self.list())

    def list(self) -> list[Found]:
        """Return every file here, the one that changed longest ago first."""
        try:
            entries = [(entry.name, entry.stat()) for entry in os.scandir(self.folder)]
        except FileNotFoundError:
            return []
        found = [Found(name, seen.st_size, seen.st_mtime) for name, seen in entries]
        return sorted(found, key=lambda one: one.changed_s)

    def put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a whole body and make it durable; one that is there under this name is replaced.

        Raises:
            StorageError: the disk refuses; nothing is left under the name then.
        """
        offset = 0
        try:
            with self._file(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
                for part in parts:
                    offset += self._write(file, part, offset)
            self.sync([name])
        except BaseException:
            self.remove(name)
            raise

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at `offset` of a body that grows; not durable before `sync`.

        Raises:
            StorageError: the disk refuses.
        """
        with self._file(name, os.O_WRONLY | os.O_CREAT) as file:
            self._write(file, data, offset)

    def sync(self, names: Iterable[str]) -> None:
        """Return once these bodies and their names are on the disk.

        Raises:
            StorageError: the disk refuses, or a body is not there.
        """
        for name in names:
            with self._file(name, os.O_WRONLY) as file:
                os.fsync(file)
        with self._file("", os.O_RDONLY) as folder:
            os.fsync(folder)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`; fewer, or none, where the body ends earlier.

        Raises:
            StorageError: no such body, or it cannot be read.
        """
        with self._file(name, os.O_RDONLY) as file:
            return os.pread(file, size, offset)

    def size(self, name: str) -> int:
        """Return the size of a body in bytes, 0 if there is none."""
        try:
            return os.stat(self.folder / name).st_size
        except FileNotFoundError:
            return 0

    def remove(self, name: str) -> None:
        """Forget a body; one that is not there is no error."""
        size = self.size(name)
        (self.folder / name).unlink(missing_ok=True)
        self.used_bytes -= size

    def remover(self, name: str) -> Callable[[], None]:
        """Return the removal of `name` as an action for later."""
        return lambda: self.remove(name)

    def _write(self, file: int, data: bytes | memoryview, offset: int) -> int:
        before = os.fstat(file).st_size
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(file, view[done:], offset + done)
        finally:
            self.used_bytes += os.fstat(file).st_size - before
        return done

    @contextmanager
    def _file(self, name: str, flags: int) -> Iterator[int]:
        path = self.folder / name
        try:
            if flags & os.O_CREAT and not self.folder.is_dir():
                self._make_folder()
            handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                yield handle
            finally:
                os.close(handle)
        except OSError as exc:
            raise StorageError(
                f"{path}: {exc.strerror}; free space on that disk or check the folder's rights; "
                "nothing confirmed was lost"
            ) from exc

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with self._file("..", os.O_RDONLY) as parent:
            os.fsync(parent)
