"""Files that are what they seem, and writes that survive a power cut.

Knows links, pipes, temporary names, fsync and rename. Does not know what is in a file.
"""

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read, if it is a regular file with one name; nothing else is even opened.

    Raises:
        OSError: it is not, or cannot be opened.
    """
    _require_plain(os.lstat(path), path)
    # The name may have changed hands since: the flags and the second look are for that. Without
    # O_NONBLOCK a named pipe would hold us until somebody writes to it.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_plain(os.fstat(handle), path)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def _require_plain(seen: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1:
        raise OSError(errno.EPERM, "not one plain file", str(path))


def replace_bytes(path: Path, data: bytes) -> None:
    """Write by temporary file, fsync and rename: after a power cut either old or new is there."""
    handle, draft = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    except OSError:
        Path(draft).unlink(missing_ok=True)
        raise


def copy_plain(source: Path, path: Path) -> None:
    """Copy to another file system, piece by piece; complete under its name or not there."""
    handle, draft = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file, open_plain(source) as old:
            shutil.copyfileobj(old, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        Path(draft).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
