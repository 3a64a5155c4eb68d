"""What the rest of the product may ask of a link: publish, subscribe, and say when it is up.

Knows no broker, no frame and no key. A link promises no delivery: a message may be lost, repeated
or reordered, and only the courier's own acknowledgements make delivery certain.
"""

from collections.abc import Callable
from typing import Protocol

Handler = Callable[[str, bytes], None]
"""Called with (topic, payload) on the link's own thread; must hand over and return at once."""

Refused = Callable[[str, bytes, str, bool], None]
"""Called with (topic, the payload's first HEAD_BYTES, reason, whether it was too large)."""
HEAD_BYTES = 17
MAX_PAYLOAD_BYTES = 320 * 1024
"""Payload limit where the broker names none. A chunk is 64 KiB; the largest manifest (512 MiB of
64 KiB chunks) carries 256 KiB of hashes. Brokers with a 128 KiB limit take models of 200 MB."""


class Link(Protocol):
    """A connection to a broker that looks after itself: it retries until it is closed."""

    @property
    def connected(self) -> bool:
        """Whether a publish may succeed now: connected, and all subscriptions are in place."""

    @property
    def max_payload(self) -> int:
        """Largest payload in bytes that `publish` takes at present."""

    @property
    def trusted_payload(self) -> int:
        """Largest payload that the broker seems to take: less than `max_payload`, for some time,
        after it cut the connection again and again on larger ones."""

    def connect(self, *, wait_s: float = 0.0) -> None:
        """Start connecting in the background, and keep trying until `close`.

        With `wait_s` above 0, return only once connected.

        Raises:
            LinkError: not connected within `wait_s`, or refused; the link goes on trying.
        """

    def close(self) -> None:
        """Disconnect and end the threads. Closing twice is harmless."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand one message to the broker; waits while the link's own window is full.

        Raises:
            LinkError: not connected, over `max_payload`, or cut while waiting.
        """

    def subscribe(self, topic: str, handler: Handler) -> None:
        """Deliver what arrives on `topic` to `handler`, now and after every reconnect."""

    def on_refused(self, callback: Refused) -> None:
        """Call `callback` when the broker refuses a message that `publish` took."""

    def refresh(self) -> None:
        """Ask for all subscriptions again, at most every few seconds; for when nothing is heard."""

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each connect, once the subscriptions are in place."""


def matches(topic: str, pattern: str) -> bool:
    """Whether an MQTT topic filter (with + and #) covers `topic`.

    Source: MQTT 3.1.1, section 4.7.
    """
    wanted = pattern.split("/")
    levels = topic.split("/")
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(levels) or level not in ("+", levels[i]):
            return False
    return len(wanted) == len(levels)
