"""A link over MQTT: MQTT 5 where the broker speaks it, 3.1.1 where it does not.

Knows paho, reconnecting and the broker's limits. Does not know what the payloads mean, and keeps
none of them: what was not acknowledged when a connection ends is forgotten here, because the
courier resends it from the outbox.

Each connection gets a fresh paho client. paho resends everything it still holds on a reconnect,
past its own in-flight limit, and an oversized message for ever; a client that never reconnects
can do neither.
"""

import logging
import queue
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_sdk.errors import ConfigError, LinkError
from edge_sdk.link.address import read_address
from edge_sdk.link.base import HEAD_BYTES, MAX_PAYLOAD_BYTES, Handler, Refused, matches
from edge_sdk.link.limits import PatientClient, SizeGuess

logger = logging.getLogger(__name__)

_PACKET_HEADER_BYTES = 512  # fixed header, topic, packet id and properties of one of our publishes
_STEADY_S = 5.0  # a connection that lived this long was a good one: back-off starts anew
_PUBLISH_WAIT_S = 30.0  # longest wait for room in the window before the caller is told
_CLOSE_WAIT_S = 5.0
_SELECT_S = 1.0
_REFRESH_S = 5.0
_CONFIRM_S = 300.0  # and so often even if all seems well
_SUBSCRIBED_S = 10.0  # a connection without our subscriptions after so long is tried anew
_ANSWER_SELECT_S = 0.1
# amqtt misreads the properties of an MQTT 5 CONNECT and waits for bytes that never come, so silence
# soon means 3.1.1; a slow link that ends up there loses nothing but speed.
_ANSWER_S = {MQTTProtocolVersion.MQTTv5: 1.2, MQTTProtocolVersion.MQTTv311: 20.0}
_NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME; Python has no name for it
_TOO_LARGE = 149
_VERSIONS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What the broker said in CONNACK; on MQTT 3.1.1 it can say nothing and these are defaults."""

    mqtt_version: str
    max_packet_bytes: int | None
    receive_maximum: int
    retain_available: bool


class MqttLink:
    """A Link (see base.py) to `mqtt://[user:password@]host[:port]` or `mqtts://...`.

    `client_id` defaults to the user of the url. `ca`, `cert` and `key` are PEM files for mqtts.
    With `now`, the broker's certificate must be good at that time, whatever this machine's clock
    says. `mqtt_version` is tried first; a broker that knows only 3.1.1 is found out by its refusal
    or its silence, and "3.1.1" saves that second. At most `window_messages` publishes (and
    `window_bytes`) are unacknowledged at any time.

    Raises:
        ConfigError: the url is not an MQTT url, or TLS files are given without mqtts.
    """

    def __init__(
        self,
        url: str,
        *,
        client_id: str = "",
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        keepalive_s: int = 60,
        max_payload: int = MAX_PAYLOAD_BYTES,
        window_messages: int = 16,
        window_bytes: int = 2 * 1024 * 1024,
        inbound_bytes: int = 32 * 1024 * 1024,
        first_retry_s: float = 1.0,
        last_retry_s: float = 300.0,
        mqtt_version: Literal["5", "3.1.1"] = "5",
        now: Callable[[], float] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._address = read_address(url)
        self.url = self._address.url
        if (ca or cert or key) and not self._address.tls:
            raise ConfigError(
                f"{self.url} does not use TLS but certificate files are set; "
                "write mqtts://, or remove the files"
            )
        self._client_id = client_id or self._address.user or ""
        self._tls_files = (ca, cert, key)
        self._now = now
        self._keepalive_s = keepalive_s
        self._own_max_payload = max_payload
        self._window = (window_messages, window_bytes)
        self._inbound_limit = inbound_bytes
        self._retry = (first_retry_s, last_retry_s)
        self._rng = rng or random.Random()

        self.dropped = 0
        self.refused = 0
        self.connections = 0
        self.limits: BrokerLimits | None = None
        self._version = _VERSIONS[mqtt_version]
        self._handlers: list[tuple[str, Handler]] = []
        self._callbacks: list[Callable[[], None]] = []
        self._state = threading.Condition()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failure = "no attempt was made yet"
        self._rejected = False
        self._answered = False
        self._up = False
        self._client: paho.Client | None = None
        self._subscribe_id: int | None = None
        self._unacknowledged: dict[
            int, tuple[int, str, bytes]
        ] = {}  # packet id -> size, topic, head
        self._refresh_at = self._confirm_at = 0.0
        self._guess = SizeGuess(time.monotonic)
        self._refused: list[Refused] = []
        self._early: set[int] = set()  # acknowledged before publish() had returned its id
        self._reserved = [0, 0]  # messages, bytes: handed to paho or about to be
        self._inbox: queue.SimpleQueue[
            tuple[paho.Client, paho.MQTTMessage] | Callable[[], None] | None
        ] = queue.SimpleQueue()
        self._inbox_bytes = 0

    # --- the Link ---------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the broker took us in and confirmed our subscriptions."""
        return self._up

    @property
    def max_payload(self) -> int:
        """The smaller of our own limit and what the broker named in CONNACK, in bytes."""
        if self.limits is None or self.limits.max_packet_bytes is None:
            return self._own_max_payload
        return min(self._own_max_payload, self.limits.max_packet_bytes - _PACKET_HEADER_BYTES)

    @property
    def trusted_payload(self) -> int:
        """As `max_payload`; less for a while after the broker cut us off for larger ones."""
        return min(self.max_payload, self._guess.limit)

    def connect(self, *, wait_s: float = 0.0) -> None:
        """Start connecting; see Link.connect.

        Raises:
            LinkError: not connected within `wait_s`, or refused; the link goes on trying.
        """
        if self._closing.is_set():
            raise LinkError(f"the link to {self.url} is closed; make a new one")
        if not self._threads:
            name = f"{self._client_id or 'link'}"
            self._threads = [
                threading.Thread(target=self._run, name=f"{name}-mqtt", daemon=True),
                threading.Thread(target=self._deliver, name=f"{name}-inbox", daemon=True),
            ]
            for thread in self._threads:
                thread.start()
        if wait_s <= 0:
            return
        with self._state:
            self._state.wait_for(lambda: self._up or self._rejected, wait_s)
            if not self._up:
                raise LinkError(f"broker {self.url}: {self._failure}")

    def close(self) -> None:
        """Disconnect and end both threads."""
        self._closing.set()
        client = self._client
        if client is not None:
            client.disconnect()
        with self._state:
            self._state.notify_all()
        self._inbox.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_CLOSE_WAIT_S)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish at QoS 1; waits while the window is full.

        Raises:
            LinkError: not connected, over `max_payload`, or cut or stalled while waiting.
        """
        if len(payload) > self.max_payload:
            raise LinkError(
                f"broker {self.url} takes {self.max_payload} bytes in one message, "
                f"not {len(payload)}; raise its limit or send smaller chunks"
            )
        client = self._reserve(len(payload))
        try:
            info = client.publish(topic, payload, qos=1, retain=retain)
        except (ValueError, RuntimeError, OSError) as exc:
            self._release(client, len(payload))
            raise LinkError(f"broker {self.url}: cannot publish on {topic}: {exc}") from exc
        with self._state:
            if client is not self._client:
                raise LinkError(f"broker {self.url} cut the connection; it will be tried again")
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                self._reserved = [self._reserved[0] - 1, self._reserved[1] - len(payload)]
                raise LinkError(f"broker {self.url}: publish failed, {paho.error_string(info.rc)}")
            if info.mid in self._early:
                self._early.discard(info.mid)
                self._free(len(payload))
            else:
                self._unacknowledged[info.mid] = (len(payload), topic, payload[:HEAD_BYTES])
                self._guess.sent(len(payload))

    def subscribe(self, topic: str, handler: Handler) -> None:
        """Deliver what arrives on `topic` to `handler`, now and after every reconnect."""
        self._handlers.append((topic, handler))
        client = self._client
        if client is not None and self._up:
            self._ask_for(client, [topic])

    def refresh(self) -> None:
        """Subscribe again: what the broker understood may not be what we asked for."""
        client, now = self._client, time.monotonic()
        if client is not None and self._up and now >= self._refresh_at:
            self._refresh_at = now + _REFRESH_S
            self._ask_for(client, [topic for topic, _ in self._handlers])

    def on_refused(self, callback: Refused) -> None:
        """Call `callback`, on the delivering thread, when the broker refuses a message."""
        self._refused.append(callback)

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each connect, once the subscriptions are in place."""
        self._callbacks.append(callback)

    # --- the window -------------------------------------------------------------------------

    def _reserve(self, size: int) -> paho.Client:
        messages, max_bytes = self._window
        if self.limits is not None:
            messages = min(messages, self.limits.receive_maximum)
        with self._state:
            client = self._client if self._up else None

            def room() -> bool:
                fits = self._reserved[1] + size <= max_bytes or self._reserved[0] == 0
                return client is not self._client or (self._reserved[0] < messages and fits)

            if client is not None and not self._state.wait_for(room, _PUBLISH_WAIT_S):
                raise LinkError(
                    f"broker {self.url} acknowledged nothing for {_PUBLISH_WAIT_S:.0f} s; "
                    "is it overloaded?"
                )
            if client is None or client is not self._client:
                raise LinkError(f"broker {self.url} is not connected: {self._failure}")
            self._reserved = [self._reserved[0] + 1, self._reserved[1] + size]
            return client

    def _release(self, client: paho.Client, size: int) -> None:
        with self._state:
            if client is self._client:
                self._free(size)

    def _free(self, size: int) -> None:
        self._reserved = [self._reserved[0] - 1, self._reserved[1] - size]
        self._state.notify_all()

    # --- the connection's thread ------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        first, last = self._retry
        while not self._closing.is_set():
            began = time.monotonic()
            version = self._version
            self._answered = False
            try:
                self._live_through_one_connection(version)
            except OSError as exc:
                self._fail(f"cannot be reached ({exc}); is it running, is the address right?")
            except Exception as exc:  # paho raises many types on malformed packets of a broker
                self._fail(f"sent something paho cannot read ({type(exc).__name__}: {exc})")
                logger.warning("broker %s: %s", self.url, self._failure)
            self._forget_connection()
            if self._version is not version and not self._rejected:
                continue  # the broker refused MQTT 5: ask again at once, in 3.1.1
            failures = 0 if time.monotonic() - began > _STEADY_S else failures + 1
            # Full jitter: many devices that lost one broker must not return in step.
            ceiling = min(last, first * 2.0 ** min(failures, 30))
            self._closing.wait(self._rng.uniform(0.0, ceiling))

    def _live_through_one_connection(self, version: MQTTProtocolVersion) -> None:
        client = self._new_client(version)
        host, port = self._address.host, self._address.port
        if version is MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)
            properties.ReceiveMaximum = self._window[0]
            client.connect(host, port, self._keepalive_s, properties=properties)
        else:
            client.connect(host, port, self._keepalive_s)
        self._check_dates(client)
        with self._state:
            self._client = client
        if self._closing.is_set():
            client.disconnect()
        answer_by = time.monotonic() + _ANSWER_S[version]
        rc = MQTTErrorCode.MQTT_ERR_SUCCESS
        while rc == MQTTErrorCode.MQTT_ERR_SUCCESS and not self._given_up(answer_by):
            rc = client.loop(timeout=_SELECT_S if self._answered else _ANSWER_SELECT_S)
            self._confirm()
        if not self._answered and not self._closing.is_set():
            self._fail("did not answer our CONNECT; is it an MQTT broker?")
            self._version = MQTTProtocolVersion.MQTTv311

    def _given_up(self, answer_by: float) -> bool:
        waits = not self._answered or (
            not self._up and time.monotonic() > answer_by + _SUBSCRIBED_S
        )
        return waits and time.monotonic() > answer_by

    def _confirm(self) -> None:
        # A SUBSCRIBE whose topic was damaged on the way is confirmed like any other, and who has
        # nothing to send would never find out that nobody can reach him.
        now = time.monotonic()
        if self._up and now >= self._confirm_at:
            self._confirm_at = now + _CONFIRM_S
            self.refresh()

    def _new_client(self, version: MQTTProtocolVersion) -> paho.Client:
        v5 = version is MQTTProtocolVersion.MQTTv5
        client = PatientClient(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if v5 else True,
            protocol=version,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.max_inflight_messages_set(self._window[0] + 1)  # ours is the window that counts
        if self._address.user is not None:
            client.username_pw_set(self._address.user, self._address.password)
        if self._address.tls:
            ca, cert, key = self._tls_files
            client.tls_set_context(self._tls_context(ca, cert, key))
        client.on_connect = self._on_connack
        client.on_subscribe = self._on_suback
        client.on_message = self._on_message
        client.on_publish = self._on_puback
        client.on_odd_puback = self._on_odd_puback
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = _without_delay
        # Without this paho writes from the publishing thread, racing with our loop.
        client.on_socket_register_write = lambda *_: None
        return client

    def _tls_context(self, ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=ca)
        if self._now is not None:
            context.verify_flags |= _NO_CHECK_TIME  # see _check_dates
        if cert:
            context.load_cert_chain(cert, key)
        return context

    def _check_dates(self, client: paho.Client) -> None:
        connection: Any = client.socket()
        if not self._address.tls or self._now is None or connection is None:
            return
        certificate = connection.getpeercert()
        begins, ends = (ssl.cert_time_to_seconds(certificate[d]) for d in ("notBefore", "notAfter"))
        # A device's time is a lower bound, so a certificate may begin a little after it.
        if self._now() >= ends or begins >= ends:
            client.disconnect()
            raise OSError(f"its certificate ended on {certificate['notAfter']}")

    def _forget_connection(self) -> None:
        with self._state:
            was_up, self._up = self._up, False
            self._client = None
            self._subscribe_id = None
            if was_up and not self._closing.is_set():
                self._guess.cut([size for size, _, _ in self._unacknowledged.values()])
            self._unacknowledged.clear()
            self._early.clear()
            self._reserved = [0, 0]
            self._state.notify_all()
        if was_up and not self._closing.is_set():
            logger.info("broker %s: connection lost, %s", self.url, self._failure)

    def _fail(self, why: str, *, rejected: bool = False) -> None:
        with self._state:
            self._failure = why
            self._rejected = rejected
            self._state.notify_all()

    # --- paho's callbacks, all on the connection's thread -----------------------------------

    def _on_connack(
        self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, said: Any
    ) -> None:
        self._answered = True
        if reason.is_failure:
            self._refused_connection(str(reason))
            return
        version = "5" if self._version is MQTTProtocolVersion.MQTTv5 else "3.1.1"
        self.limits = BrokerLimits(
            mqtt_version=version,
            max_packet_bytes=getattr(said, "MaximumPacketSize", None),
            receive_maximum=getattr(said, "ReceiveMaximum", 65_535),
            retain_available=bool(getattr(said, "RetainAvailable", 1)),
        )
        topics = [topic for topic, _ in self._handlers]
        if topics:
            self._subscribe_id = self._ask_for(client, topics)
        else:
            self._now_up()

    def _refused_connection(self, reason: str) -> None:
        if reason == "Unsupported protocol version" and (
            self._version is MQTTProtocolVersion.MQTTv5
        ):
            self._version = MQTTProtocolVersion.MQTTv311
            return
        self._fail(
            f"refused the connection ({reason}); check the user, the password and "
            "that this client is allowed",
            rejected=True,
        )
        logger.warning("broker %s %s", self.url, self._failure)

    def _ask_for(self, client: paho.Client, topics: Sequence[str]) -> int | None:
        if self._version is MQTTProtocolVersion.MQTTv5:
            _, mid = client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in topics])
        else:
            _, mid = client.subscribe([(topic, 1) for topic in topics])
        return mid

    def _on_suback(
        self, _client: paho.Client, _data: Any, mid: int, reasons: list[ReasonCode], _said: Any
    ) -> None:
        if any(reason.is_failure for reason in reasons):
            self._fail("refused a subscription; check this user's access rules", rejected=True)
            logger.warning("broker %s %s", self.url, self._failure)
            return
        if mid == self._subscribe_id:
            self._now_up()

    def _now_up(self) -> None:
        with self._state:
            self._up = True
            self._rejected = False
            self._confirm_at = time.monotonic() + _REFRESH_S
            self._failure = "the connection was cut"
            self.connections += 1
            self._state.notify_all()
        logger.info("broker %s: connected as %s", self.url, self._client_id[:12])
        self._inbox.put(None)  # the delivering thread runs the callbacks

    def _on_message(self, client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        size = len(message.payload)
        with self._state:
            full = self._inbox_bytes + size > self._inbound_limit
            if not full:
                self._inbox_bytes += size
        if full:
            self.dropped += 1  # the sender resends what was not confirmed end to end
            client.ack(message.mid, message.qos)
            return
        self._inbox.put((client, message))

    def _on_puback(
        self, client: paho.Client, _data: Any, mid: int, reason: ReasonCode, _said: Any
    ) -> None:
        # paho holds its own lock here, so this must never wait for a thread inside publish().
        with self._state:
            if client is not self._client:
                return
            sent = self._unacknowledged.pop(mid, None)
            if sent is None:
                self._early.add(mid)
            else:
                self._free(sent[0])
            if sent is not None and not reason.is_failure:
                self._guess.taken(sent[0])
        if reason.is_failure:
            self._refuse(sent, str(reason))

    def _on_odd_puback(self, client: paho.Client, mid: int, code: int) -> None:
        """A PUBACK with a reason that paho does not know; 149 is "packet too large"."""
        with self._state:
            sent = self._unacknowledged.pop(mid, None) if client is self._client else None
            if sent is not None:
                self._free(sent[0])
        too_large = code == _TOO_LARGE
        self._refuse(sent, "Packet too large" if too_large else f"reason {code}", too_large)

    def _refuse(
        self, sent: tuple[int, str, bytes] | None, reason: str, too_large: bool = False
    ) -> None:
        self.refused += 1
        logger.info("broker %s refused a message: %s", self.url, reason)
        if sent is not None:
            _, topic, head = sent
            for callback in self._refused:
                self._inbox.put(partial(callback, topic, head, reason, too_large))

    def _on_disconnect(
        self, _client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _said: Any
    ) -> None:
        if self._up:
            self._fail(f"the connection was cut ({reason})")

    # --- the delivering thread --------------------------------------------------------------

    def _deliver(self) -> None:
        while not self._closing.is_set():
            item = self._inbox.get()
            if self._closing.is_set():
                return
            if item is None:
                for callback in list(self._callbacks):
                    callback()
                continue
            if callable(item):
                item()
                continue
            client, message = item
            with self._state:
                self._inbox_bytes -= len(message.payload)
            try:
                topic = message.topic
            except UnicodeDecodeError:  # bytes changed on the way; this thread must outlive them
                logger.warning("broker %s: a message on a topic that is not text", self.url)
                topic = ""
            for pattern, handler in list(self._handlers):
                if topic and matches(topic, pattern):
                    handler(topic, bytes(message.payload))
            if client is self._client:
                client.ack(message.mid, message.qos)


def _without_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    # Nagle's algorithm holds a small frame back for 40 ms, and a transfer is many round trips.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
