"""Who may ask this machine's models: by the headers of a request, before anything else is read.

Knows names of this machine, origins of web pages and the key. Does not know sockets or requests.

By default the endpoint listens on a loopback address only. A web page that the user has open can
reach loopback too, so three more things are checked: `Host` must name this machine (a page whose
own name was pointed at 127.0.0.1 says its own), a page's `Origin` must have been allowed, and a
body must call itself JSON, which a page cannot send without asking first; such a question is
answered for allowed origins only. Other users of the machine are kept out by the key alone.
"""

import hmac
import ipaddress
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import urlsplit

from edge_sdk.openai_requests import ApiError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Door:
    """Who may ask: names of this machine, origins of pages, and the key if there is one."""

    hosts: frozenset[str] = LOOPBACK_NAMES
    origins: frozenset[str] = frozenset()
    key: str = field(default="", repr=False)

    def check(self, headers: Message, *, keyed: bool = True) -> None:
        """Let a request pass by its headers alone.

        Raises:
            ApiError: 403 for a foreign host or page, 401 for a wrong key.
        """
        host = headers.get("Host") or ""
        name = _host_name(host)
        if name not in self.hosts and not _is_address(name):
            raise ApiError(
                403,
                f"this endpoint is not {host[:80]!r}; its names are "
                f"{', '.join(sorted(self.hosts))}; allow more with --allow-host",
                code="host_not_allowed",
            )
        origin = headers.get("Origin")
        foreign = headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        if (origin is not None or foreign) and origin not in self.origins:
            raise ApiError(
                403,
                f"web pages of {(origin or 'other sites')[:80]} may not use this endpoint; "
                "allow one with --allow-origin",
                code="origin_not_allowed",
            )
        given = (headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if keyed and self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise ApiError(401, "the API key is wrong or missing", code="invalid_api_key")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(name: str) -> bool:
    """Whether a name is a number, which nobody can point elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; "" if it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
