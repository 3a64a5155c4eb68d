"""Where a broker is and as whom we go there: the url of a broker, read and checked.

Knows `mqtt://[user:password@]host[:port]` and `mqtts://...`. Does not know connections.
"""

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from edge_sdk.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """A broker's address. `url` has no password and may be shown."""

    url: str
    host: str
    port: int
    tls: bool
    user: str | None
    password: str | None = field(repr=False)


def read_address(url: str) -> Address:
    """Return what `url` says.

    Raises:
        ConfigError: it is not an MQTT url.
    """
    parts = urlsplit(url)
    shown = _without_password(url)
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise ConfigError(
            f"{shown!r} is not a broker url; write mqtt://host:port or mqtts://host:port"
        )
    tls = parts.scheme == "mqtts"
    try:
        port = parts.port or (8883 if tls else 1883)
    except ValueError as exc:
        raise ConfigError(f"broker url {shown}: {exc}; use a port from 1 to 65535") from exc
    user = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if parts.password else None
    return Address(shown, parts.hostname, port, tls, user, password)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.username is None and parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username}@{host}" if parts.username else host).geturl()
