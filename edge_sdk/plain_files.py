"""Opens a file only if it is what it seems: regular, under one name, no link, pipe or device.

Knows what the file system says about a path. Does not know what is in the file.
"""

import errno
import os
import stat
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
