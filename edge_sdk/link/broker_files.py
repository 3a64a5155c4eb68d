"""A strict broker's files: its configuration, access rules and users, each line with its reason.

Knows mosquitto's language. Starts nothing: broker.py runs what is written here for demos and tests,
and `symbiont broker config` writes the same for an operator's broker.

    mosquitto.conf    start with `mosquitto -c FOLDER/mosquitto.conf`
    acl               who may use which topic; one rule for all devices
    passwords         hashed, mode 0600; changed by `set_user` and `drop_user`
    mosquitto.pid     written by the broker, for `reload`
"""

import fcntl
import os
import pwd
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import ConfigError, StorageError
from edge_sdk.link.passwords import (
    hash_password,
    mosquitto_acl,
    read_password_file,
    write_hashes,
)

PACKET_BYTES = 524_288
"""Above our largest frame (a manifest of 512 MiB is 320 KiB), far below what fills a machine."""

AUTHORITY_FILE, CRL_FILE = "authority.pem", "revoked.pem"
"""The tenant's authority and its list of revoked certificates, in a folder with mutual TLS."""
_MUTUAL_FILE = "mutual.url"

_HEAD = """\
# A strict broker for Symbiont, made by `symbiont broker config`. Change nothing to start it:
#   mosquitto -c {folder}/mosquitto.conf
# The broker is trusted with nothing but delivery: all content is sealed end to end, and what it
# drops is sent again. These lines keep strangers out and one device away from another.

# Nobody without a name. (Since 2.0 this is the default; it is stated because all else rests on it.)
allow_anonymous false
# Who may enter, as PBKDF2 hashes; read again on SIGHUP, which also ends the sessions of those who
# are no longer in it. `symbiont device revoke` uses that.
password_file {folder}/passwords
# A device writes v1/+/<its name>/up, reads v1/+/<its name>/down and v1/+/coordinator/keys, no more.
acl_file {folder}/acl

# Larger packets end the connection before they are read into memory.
# message_size_limit is not used: it confirms such messages and drops them.
max_packet_size {packet}
# Per client that reads slowly; beyond it the broker drops, and the sender sends again.
max_queued_bytes 33554432
max_queued_messages 2000
# Unacknowledged messages on the way to one client; ours has 16 on the way to the broker.
max_inflight_messages 20
# All clients together; a flood fills this, not the machine.
memory_limit 536870912
# Small frames wait for nobody: a transfer is many round trips.
set_tcp_nodelay true
# No statistics on $SYS: they tell who is connected how much, and cost wake-ups.
sys_interval 0

"""
_KEEPING = """\
# Keep the retained key bundle over a restart, so that devices that start while the coordinator is
# away know its keys. Messages need no keeping: a sender forgets one only when it is signed for.
persistence true
persistence_location {folder}/
autosave_interval 60
# Our clients keep no sessions; what others left ends here.
persistent_client_expiration 1d
# `symbiont device revoke` sends SIGHUP to this process.
pid_file {folder}/mosquitto.pid

"""
_FORGETTING = """\
# Nothing on the disk: the coordinator announces its keys again whenever it connects.
persistence false

"""
_LISTENER = """\
listener {port} {bind}
# The client id is the name that was proven, or one device could end the session of another.
use_username_as_clientid true
"""
_PLAIN = """\
# Without TLS: names, topics and sizes are seen on the wire, passwords too. Loopback only.
"""
_TLS = """\
# TLS 1.3 and nothing older.
tls_version tlsv1.3
certfile {cert}
keyfile {key}
"""
_MUTUAL = """\
# Every client shows a certificate of the tenant's own authority; its common name is the user.
cafile {ca}
require_certificate true
use_identity_as_username true
# Certificates of revoked devices. Read on SIGHUP, for new connections only: open ones are ended by
# `symbiont device revoke` itself.
crlfile {crl}
"""
_TAIL = """\

# Drop root, if started with it, to whoever owns these files.
user {user}
log_dest stderr
log_type error
log_type warning
"""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where the broker listens. With `cert` and `key` over TLS, with `ca` and `crl` mutual.

    `host` is the name that the broker's certificate is for.
    """

    port: int
    bind: str = "127.0.0.1"
    host: str = ""
    cert: str = ""
    key: str = ""
    ca: str = ""
    crl: str = ""

    @property
    def url(self) -> str:
        """The url for clients on this machine."""
        host = self.host or ("127.0.0.1" if self.bind in ("", "0.0.0.0") else self.bind)
        return f"{'mqtts' if self.cert else 'mqtt'}://{host}:{self.port}"

    def check(self) -> None:
        """Check that the parts fit.

        Raises:
            ConfigError: half a certificate, or passwords beyond this machine without TLS.
        """
        if bool(self.cert) != bool(self.key) or bool(self.ca) != bool(self.crl):
            raise ConfigError("a listener has certificate and key, and authority and CRL, or none")
        if self.ca and not self.cert:
            raise ConfigError("client certificates need a certificate of the broker as well")
        if not self.cert and self.bind not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(
                f"without TLS the broker listens on 127.0.0.1 only, not on {self.bind}; "
                "give it a certificate and a key"
            )


def write_broker(
    folder: Path,
    listeners: Sequence[Listener],
    *,
    users: Mapping[str, str],
    keep: bool,
    tenants: Sequence[str] = (),
) -> Path:
    """Write all files of a broker into `folder` and return its configuration file.

    `users` are {name: password}. `keep`: over restarts, and with a process id to signal. `tenants`:
    those whose topics it carries, empty for any.

    Raises:
        ConfigError: a listener's parts do not fit.
        StorageError: the folder cannot be written.
    """
    home = folder.absolute()
    for listener in listeners:
        listener.check()
    parts = [_HEAD.format(folder=home, packet=PACKET_BYTES)]
    parts.append((_KEEPING if keep else _FORGETTING).format(folder=home))
    for each in listeners:
        parts.append(_LISTENER.format(port=each.port, bind=each.bind))
        parts.append(_TLS.format(cert=each.cert, key=each.key) if each.cert else _PLAIN)
        if each.ca:
            parts.append(_MUTUAL.format(ca=each.ca, crl=each.crl))
    parts.append(_TAIL.format(user=pwd.getpwuid(os.getuid()).pw_name))
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        acl = home / "acl"
        acl.write_text(mosquitto_acl(tenants), encoding="utf-8")
        acl.chmod(0o600)
        write_hashes(home / "passwords", {u: hash_password(p) for u, p in users.items()})
        mutual = [each.url for each in listeners if each.ca]
        if mutual:
            (home / _MUTUAL_FILE).write_text(mutual[0], encoding="ascii")
        path = home / "mosquitto.conf"
        path.write_text("".join(parts), encoding="utf-8")
    except OSError as exc:
        raise StorageError(f"cannot write the broker's files in {home}: {exc}") from exc
    return path


def mutual_url(folder: Path) -> str:
    """Return the url at which the broker of `folder` asks for certificates, "" for nowhere."""
    path = folder / _MUTUAL_FILE
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def check_users(users: Mapping[str, str]) -> None:
    """Check names and passwords.

    Raises:
        ConfigError: one cannot be used.
    """
    for user, password in users.items():
        if not user or any(c in user for c in ":/+#\r\n") or not password or "\n" in password:
            raise ConfigError(
                f"broker user {user!r} cannot be used; a name has none of ':/+#' and "
                "a password is one line"
            )


def set_user(folder: Path, user: str, password: str) -> None:
    """Let `user` in from the next `reload` on, under this password alone.

    Raises:
        ConfigError: the name or password cannot be used, or the folder holds no broker.
    """
    check_users({user: password})
    with _hashes(folder) as hashes:
        hashes[user] = hash_password(password)


def drop_user(folder: Path, user: str) -> bool:
    """Let `user` in no more; `reload` ends its session. Return whether it was let in before.

    Raises:
        ConfigError: the folder holds no broker.
    """
    with _hashes(folder) as hashes:
        return hashes.pop(user, None) is not None


def reload(folder: Path) -> None:
    """Make the broker that runs from `folder` on this machine read its files again.

    Raises:
        ConfigError: none runs, or it is another user's process.
    """
    path = folder / "mosquitto.pid"
    try:
        number = int(path.read_text(encoding="ascii"))
        name = Path(f"/proc/{number}/comm")
        if name.exists() and name.read_text().strip() != "mosquitto":
            raise ProcessLookupError(f"process {number} is not a broker")
        os.kill(number, signal.SIGHUP)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"the broker of {folder} could not be told ({exc}); send its process SIGHUP"
        ) from exc


@contextmanager
def _hashes(folder: Path) -> Iterator[dict[str, str]]:
    path = folder / "passwords"
    try:
        with (folder / "passwords.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once must not undo each other
            hashes = read_password_file(path)
            yield hashes
            write_hashes(path, hashes)
    except OSError as exc:
        raise ConfigError(
            f"{folder} holds no broker that can be changed ({exc}); "
            "make one with `symbiont broker config`"
        ) from exc
