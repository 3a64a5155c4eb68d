"""A broker and links inside one process, for tests: of this product and of what is built on it.

Knows topics, retained messages and how to misbehave on request. Knows no sockets and no threads:
a publish delivers before it returns, so a seeded test takes the same path every time.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from edge_sdk.errors import LinkError
from edge_sdk.link.base import HEAD_BYTES, MAX_PAYLOAD_BYTES, Handler, Refused, matches


@dataclass(frozen=True, slots=True)
class Faults:
    """How often the broker misbehaves: each a probability per delivery, in [0, 1]."""

    lose: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    """Held back until some later message has passed it: reordering."""


class MemoryBroker:
    """Carries messages between its links; `faults` (drawn from `rng`) make it a bad network."""

    def __init__(self, *, faults: Faults | None = None, rng: random.Random | None = None) -> None:
        self.faults = faults or Faults()
        self.delivered = 0
        self.lost = 0
        self._rng = rng or random.Random(0)
        self._links: list[MemoryLink] = []
        self._retained: dict[str, bytes] = {}
        self._held: list[tuple[MemoryLink, str, bytes]] = []
        self._lock = threading.RLock()

    def link(self, name: str, *, max_payload: int = MAX_PAYLOAD_BYTES) -> "MemoryLink":
        """A new, unconnected link of this broker; `name` appears in its errors."""
        return MemoryLink(self, name, max_payload)

    def flush(self) -> None:
        """Deliver everything that was held back."""
        with self._lock:
            held, self._held = self._held, []
        for link, topic, payload in held:
            self._hand(link, topic, payload)

    def _attach(self, link: "MemoryLink") -> None:
        with self._lock:
            self._links.append(link)
            kept = list(self._retained.items())
        for topic, payload in kept:
            link.receive(topic, payload)

    def _detach(self, link: "MemoryLink") -> None:
        with self._lock:
            self._links = [other for other in self._links if other is not link]
            self._held = [item for item in self._held if item[0] is not link]

    def _retained_for(self, pattern: str) -> list[tuple[str, bytes]]:
        with self._lock:
            return [(t, p) for t, p in self._retained.items() if matches(t, pattern)]

    def _publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        with self._lock:
            if retain:
                self._retained[topic] = payload
            takers = [link for link in self._links if link.wants(topic)]
        for link in takers:
            self._deliver(link, topic, payload)

    def _deliver(self, link: "MemoryLink", topic: str, payload: bytes) -> None:
        with self._lock:
            fate = self._rng.random()
            late = self._rng.random() < self.faults.delay
            release = [i for i in range(len(self._held)) if self._rng.random() < 0.5]
            held = [self._held[i] for i in release]
            self._held = [item for i, item in enumerate(self._held) if i not in release]
            if fate < self.faults.lose:
                self.lost += 1
            elif late:
                self._held.append((link, topic, payload))
        if fate >= self.faults.lose and not late:
            self._hand(link, topic, payload)
            if fate > 1.0 - self.faults.duplicate:
                self._hand(link, topic, payload)
        for other, other_topic, other_payload in held:
            self._hand(other, other_topic, other_payload)

    def _hand(self, link: "MemoryLink", topic: str, payload: bytes) -> None:
        self.delivered += 1
        link.receive(topic, payload)


class MemoryLink:
    """A Link (see base.py) to a MemoryBroker. `cut` and `connect` stand for a flaky network."""

    def __init__(self, broker: MemoryBroker, name: str, max_payload: int) -> None:
        self.name = name
        self.sent_bytes = 0
        self.refuse: Callable[[bytes], str] = lambda _payload: ""
        """Why the broker refuses a payload, "" if it takes it; replace it in a test."""
        self._refused: list[Refused] = []
        self._broker = broker
        self._max_payload = max_payload
        self._handlers: list[tuple[str, Handler]] = []
        self._callbacks: list[Callable[[], None]] = []
        self._connected = False

    @property
    def connected(self) -> bool:
        """Whether the link is up."""
        return self._connected

    @property
    def max_payload(self) -> int:
        """Largest payload in bytes that `publish` takes."""
        return self._max_payload

    @property
    def trusted_payload(self) -> int:
        """Largest payload in bytes that `publish` takes."""
        return self._max_payload

    def connect(self, *, wait_s: float = 0.0) -> None:
        """Connect at once; never waits."""
        if self._connected:
            return
        self._connected = True
        self._broker._attach(self)
        for callback in list(self._callbacks):
            callback()

    def cut(self) -> None:
        """Lose the connection, and whatever was on its way here."""
        self._connected = False
        self._broker._detach(self)

    def close(self) -> None:
        """Disconnect."""
        self.cut()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Deliver to every link that subscribed.

        Raises:
            LinkError: not connected, or over `max_payload`.
        """
        if not self._connected:
            raise LinkError(f"memory link {self.name} is not connected; call connect()")
        if len(payload) > self._max_payload:
            raise LinkError(
                f"memory link {self.name} takes {self._max_payload} bytes, not {len(payload)}; "
                "send smaller chunks"
            )
        self.sent_bytes += len(payload)
        reason = self.refuse(payload)
        if reason:
            for callback in self._refused:
                callback(topic, payload[:HEAD_BYTES], reason, False)
            return
        self._broker._publish(topic, payload, retain=retain)

    def subscribe(self, topic: str, handler: Handler) -> None:
        """Deliver what arrives on `topic` to `handler`; retained messages at once."""
        self._handlers.append((topic, handler))
        if self._connected:
            for kept_topic, payload in self._broker._retained_for(topic):
                handler(kept_topic, payload)

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each connect."""
        self._callbacks.append(callback)

    def refresh(self) -> None:
        """Nothing to do: this broker forgets no subscription."""

    def on_refused(self, callback: Refused) -> None:
        """Call `callback` when a message is refused; `refuse` says which are."""
        self._refused.append(callback)

    def wants(self, topic: str) -> bool:
        """Whether some subscription of this link covers `topic`."""
        return any(matches(topic, pattern) for pattern, _ in self._handlers)

    def receive(self, topic: str, payload: bytes) -> None:
        """Called by the broker: hand one message to the handlers that cover its topic."""
        if not self._connected:
            return
        for pattern, handler in list(self._handlers):
            if matches(topic, pattern):
                handler(topic, payload)
