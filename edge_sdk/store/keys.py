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


def load_or_create(path: Path, *, hybrid: bool = False) -> Identity:
    """Return the identity in `path`, or make one there (mode 0600) when there is no file.

    Two processes that create at once get the same identity. `hybrid` adds a hybrid receive key to
    an identity that has none; one that is there stays, since peers seal to it.

    Raises:
        ConfigError: others may read the file.
        StorageError: the file is damaged, or cannot be read or written.
    """
    try:
        if not path.exists():
            _create(path, Identity.generate(hybrid=hybrid))
        identity = _load(path)
        if hybrid and not identity.hybrid:
            identity = identity.with_hybrid()
            save(path, identity)
        return identity
    except OSError as exc:
        raise StorageError(f"cannot use the key file {path}: {exc}; check disk and rights") from exc


def save(path: Path, identity: Identity) -> None:
    """Put `identity` in the place of what is in `path`; a power cut leaves the old or the new.

    Raises:
        StorageError: it cannot be written.
    """
    write_private(path, _text(identity))


def read_private(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a secret file.

    Raises:
        ConfigError: others may read it.
        OSError: it is not there, or cannot be read.
    """
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if os.name == "posix" and mode & 0o077:
            raise ConfigError(
                f"the key file {path} has mode {mode:04o} and may be read by others; "
                f"if nobody has, run `chmod 600 {path}`, else remove it and enrol again"
            )
        return file.read(max_bytes)


def write_private(path: Path, data: bytes) -> None:
    """Write a secret file (mode 0600) in one step, in the place of the one that may be there.

    Raises:
        StorageError: the disk is full or refuses; the old file stays.
    """
    beside = path.with_name(f"{path.name}.{os.urandom(8).hex()}.new")
    try:
        try:
            _write(beside, data)
            os.replace(beside, path)
            _sync_names(path.parent)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as exc:
        raise StorageError(f"cannot write {path}: {exc}; check disk and rights") from exc


def _load(path: Path) -> Identity:
    data = read_private(path, _MAX_BYTES)
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
    try:
        _write(beside, _text(identity))
        try:
            os.link(beside, path)
        except FileExistsError:
            return
        _sync_names(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _text(identity: Identity) -> bytes:
    return _HEADING + base64.b64encode(identity.to_bytes()) + b"\n"


def _write(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as writer:
        writer.write(data)
        writer.flush()
        os.fsync(writer.fileno())


def _sync_names(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
