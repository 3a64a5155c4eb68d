"""The password file that both brokers read, and who may use which topic.

Knows mosquitto's `$7$` hashes (PBKDF2-SHA512) and the access rules of PROTOCOL.md 5.4. Knows no
broker process.
"""

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

COORDINATOR = "coordinator"
"""The broker user, and reserved device id, that may read and write every topic of its tenants."""

_ITERATIONS = 2_000  # about 2 ms: mosquitto hashes on its only thread, and our passwords are random
_SALT_BYTES = 12
_HASH_BYTES = 64


def hash_password(password: str) -> str:
    """Return `password` as mosquitto stores it, under a fresh salt."""
    salt = os.urandom(_SALT_BYTES)
    digest = _digest(password, salt, _ITERATIONS)
    encoded = [base64.b64encode(part).decode("ascii") for part in (salt, digest)]
    return f"$7${_ITERATIONS}${encoded[0]}${encoded[1]}"


def check_password(password: str, hashed: str) -> bool:
    """Whether `password` is the one that `hash_password` turned into `hashed`."""
    try:
        empty, kind, iterations, salt, digest = hashed.split("$")
        known = base64.b64decode(digest, validate=True)
        computed = _digest(password, base64.b64decode(salt, validate=True), int(iterations))
    except (ValueError, binascii.Error):
        return False
    return empty == "" and kind == "7" and hmac.compare_digest(known, computed)


def _digest(password: str, salt: bytes, iterations: int) -> bytes:
    return hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations, _HASH_BYTES)


def write_password_file(path: Path, users: Mapping[str, str]) -> None:
    """Write `{user: password}` hashed, in one step, readable by the file's owner only."""
    write_hashes(path, {user: hash_password(password) for user, password in users.items()})


def write_hashes(path: Path, hashes: Mapping[str, str]) -> None:
    """Write `{user: hash}` in one step, readable by the file's owner only."""
    text = "".join(f"{user}:{hashed}\n" for user, hashed in hashes.items())
    fresh = path.with_name(path.name + ".new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)


def read_password_file(path: Path) -> dict[str, str]:
    """Return `{user: hash}`."""
    lines = path.read_text("utf-8").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def coordinator_of(tenant: str) -> str:
    """Return the broker user of a coordinator that shares its broker with other tenants'."""
    return f"{COORDINATOR}.{tenant}"


def may_write(user: str, topic: str) -> bool:
    """Whether `user` may publish on `topic`; decided by the broker, never by the client."""
    levels = topic.split("/")
    if levels[0] != "v1":
        return False
    return _coordinates(user, levels) or (len(levels) == 4 and levels[2:] == [user, "up"])


def may_read(user: str, topic: str) -> bool:
    """Whether `user` may subscribe to the filter `topic`, and receive what is published on it."""
    levels = topic.split("/")
    if levels[0] != "v1":
        return False
    if _coordinates(user, levels):
        return True
    # A filter with wildcards in the last two levels equals neither list, so it is refused.
    return len(levels) == 4 and levels[2:] in ([user, "down"], [COORDINATOR, "keys"])


def _coordinates(user: str, levels: list[str]) -> bool:
    return user == COORDINATOR or (len(levels) > 1 and user == coordinator_of(levels[1]))


def mosquitto_acl(tenants: Iterable[str] = ()) -> str:
    """Return the rules of `may_write` and `may_read` in mosquitto's language.

    With `tenants`, for their topics alone, and each may have a coordinator of its own.
    """
    named = list(tenants)
    lines = [f"user {COORDINATOR}", "topic readwrite v1/#", ""]
    for tenant in named:
        lines += [f"user {coordinator_of(tenant)}", f"topic readwrite v1/{tenant}/#", ""]
    for tenant in named or ["+"]:
        lines += [
            f"pattern write v1/{tenant}/%u/up",
            f"pattern read v1/{tenant}/%u/down",
            f"pattern read v1/{tenant}/{COORDINATOR}/keys",
        ]
    return "\n".join(lines) + "\n"
