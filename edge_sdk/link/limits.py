"""What a broker cannot or does not say about its limits, found out by what it does.

Knows two habits of brokers. Does not know connections, topics or what is sent.

- On MQTT 3.1.1 a broker has no way to name its largest packet; mosquitto cuts the connection when
  one is larger. Whoever then sends the same packet again is cut off for ever (`SizeGuess`).
- On MQTT 5 mosquitto may answer "packet too large" (149) to a publish; paho 2.2 takes that answer
  for a malformed packet and raises, with the same result (`PatientClient`).
"""

import struct
from collections.abc import Callable, Iterable
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode

STRIKES = 6
"""So many connections in a row must end right after a message larger than any that was taken."""
RIGHT_AFTER_S = 3.0
FIRST_GUESS_S = 20.0
"""How long a guess is believed at first; then one larger message is tried, as the cuts may have had
another reason, and each time it fails the guess is believed twice as long, up to LAST_GUESS_S. That
a guess can be wrong is why messages are held back by it and not given up."""
LAST_GUESS_S = 600.0
_NO_LIMIT = 2**62
_PUBACK_REASONS = frozenset({0, 16, 128, 131, 135, 144, 145, 151, 153})  # MQTT 5, section 3.4.2.1


class SizeGuess:
    """The largest payload that a broker seems to take, judged by which messages it cuts us off for.

    A network that fails now and then is not mistaken for that: the first larger message that is
    acknowledged ends all suspicion.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._proven = 0
        self._strikes = 0
        self._suspect = _NO_LIMIT
        self._sent_at = 0.0
        self._believed_until = 0.0
        self._belief_s = FIRST_GUESS_S

    @property
    def limit(self) -> int:
        """The guess in bytes; very large without one."""
        return self._suspect - 1 if self._clock() < self._believed_until else _NO_LIMIT

    def sent(self, size: int) -> None:
        """A message went out."""
        if size > self._proven:
            self._sent_at = self._clock()

    def taken(self, size: int) -> None:
        """The broker acknowledged a message."""
        if size > self._proven:
            self._proven = size
            self._strikes, self._suspect, self._believed_until = 0, _NO_LIMIT, 0.0
            self._belief_s = FIRST_GUESS_S

    def cut(self, waiting: Iterable[int]) -> None:
        """The connection ended while messages of these sizes were not acknowledged."""
        larger = [size for size in waiting if size > self._proven]
        if not larger or self._clock() - self._sent_at > RIGHT_AFTER_S:
            return
        self._strikes += 1
        self._suspect = min(self._suspect, *larger)
        if self._strikes >= STRIKES:
            self._believed_until = self._clock() + self._belief_s
            self._belief_s = min(LAST_GUESS_S, 2 * self._belief_s)


class PatientClient(paho.Client):
    """paho's client, but a PUBACK with a reason that paho has no name for is told, not raised."""

    on_odd_puback: Callable[[paho.Client, int, int], None] | None = None

    def _handle_pubackcomp(self, cmd: Any) -> MQTTErrorCode:
        packet = bytes(self._in_packet["packet"])
        if len(packet) < 3 or packet[2] in _PUBACK_REASONS or self.on_odd_puback is None:
            return super()._handle_pubackcomp(cmd)
        (mid,) = struct.unpack_from(">H", packet)
        with self._out_message_mutex:
            if self._out_messages.pop(mid, None) is not None:
                self._inflight_messages = max(0, self._inflight_messages - 1)
        self.on_odd_puback(self, mid, packet[2])
        return MQTTErrorCode.MQTT_ERR_SUCCESS
