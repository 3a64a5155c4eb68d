"""A TCP proxy before a broker that records all that passes, and reads clients' MQTT out of it."""

import contextlib
import socket
import threading
from collections import Counter

from edge_sdk.wire.transfer import Chunk, Offer, decode_frame


class RecordingProxy:
    """Passes every connection on to `port`.

    `sent` holds the client's bytes by connection, `received` the broker's.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.sent: list[bytearray] = []
        self.received: list[bytearray] = []
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def recording(self) -> bytes:
        """All that passed so far, in both directions; no two streams are mixed."""
        return b"\n".join([*self.sent, *self.received])

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                broker = socket.create_connection(("127.0.0.1", self._target))
                self.sent.append(bytearray())
                self.received.append(bytearray())
                for pair in (
                    (client, broker, self.sent[-1]),
                    (broker, client, self.received[-1]),
                ):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                record += data
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def payloads(self) -> list[bytes]:
        """Every whole PUBLISH payload that clients sent, in order."""
        return [payload for record in self.sent for payload in _published(bytes(record))]

    def messages(self) -> Counter[str]:
        """Stream id -> bytes of the frames that carry a message: offers and chunks."""
        found: Counter[str] = Counter()
        for payload in self.payloads():
            frame = decode_frame(payload) if payload else None
            if isinstance(frame, Offer | Chunk):
                found[frame.stream.hex()] += len(payload)
        return found


def _published(data: bytes) -> list[bytes]:
    """MQTT 3.1.1 or 5, sections 2.1.4 and 3.3: the payloads of the PUBLISH packets."""
    found, at, version = [], 0, 4
    while at < len(data):
        kind, start = data[at], at + 1
        length, shift = 0, 0
        while True:
            if start >= len(data):
                return found
            length |= (data[start] & 127) << shift
            shift, start = shift + 7, start + 1
            if not data[start - 1] & 128:
                break
        at = start + length
        body = data[start:at]
        if len(body) < length:
            return found  # the client was killed amid this packet
        if kind >> 4 == 1:
            version = body[6]
        elif kind >> 4 == 3:
            place = 2 + int.from_bytes(body[:2], "big") + (2 if kind & 6 else 0)
            if version == 5:
                place += 1 + body[place]  # our properties are shorter than 128 bytes
            found.append(body[place:])
    return found
