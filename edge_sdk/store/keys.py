"""Private keys in a file that only its owner can read.

Knows one small file format. Does not know what the keys are for.
"""

import base64
import binascii
import os
import stat
from pathlib import Path

from edge_sdk.errors import ConfigError, LocalProtocolError, StorageError
from edge_sdk.wire.seal import Identity

_HEADING = b"symbiont-identity-1\n"
_MAX_BYTES = 4096


def load_or_create(path: Path) -> Identity:
    """Return the identity in `path`, or make one there (mode 0600) when there is no file.

    Two processes that create at once get the same identity.

    Raises:
        ConfigError: others may read the file.
        StorageError: the file is damaged, or cannot be read or written.
    """
    try:
        if not path.exists():
            _create(path, Identity.generate())
        return _load(path)
    except OSError as exc:
        raise StorageError(f"cannot use the key file {path}: {exc}; check disk and rights") from exc


def _load(path: Path) -> Identity:
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if os.name == "posix" and mode & 0o077:
            raise ConfigError(
                f"the key file {path} has mode {mode:04o} and may be read by others; "
                f"if nobody has, run `chmod 600 {path}`, else remove it and enrol again"
            )
        data = file.read(_MAX_BYTES)
    try:
        if not data.startswith(_HEADING):
            raise ValueError("no heading")
        return Identity.from_bytes(
            base64.b64decode(data.removeprefix(_HEADING).strip(), validate=True)
        )
    except (ValueError, binascii.Error, LocalProtocolError) as exc:
        raise StorageError(
            f"the key file {path} is damaged; restore a copy, or remove it and enrol again"
        ) from exc


def _create(path: Path, identity: Identity) -> None:
    # Written beside and linked into place: a power cut leaves a whole file or none, and the first
    # of two who create wins.
    beside = path.with_name(f"{path.name}.{os.urandom(8).hex()}.new")
    file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "wb") as writer:
            writer.write(_HEADING + base64.b64encode(identity.to_bytes()) + b"\n")
            writer.flush()
            os.fsync(writer.fileno())
        try:
            os.link(beside, path)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)
