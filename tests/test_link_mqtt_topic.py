"""A link outlives a message whose topic was damaged on the way (found by torture F4)."""

import queue
import socket
import threading

from edge_sdk.link.mqtt import MqttLink

CONNACK, PUBACK_TYPE = b"\x20\x02\x00\x00", 4
SOON_S = 10.0


def publish(topic: bytes, mid: int) -> bytes:
    body = len(topic).to_bytes(2, "big") + topic + mid.to_bytes(2, "big") + b"payload"
    return bytes([0x32, len(body)]) + body


def packet(stream: socket.socket) -> tuple[int, bytes]:
    head = stream.recv(2, socket.MSG_WAITALL)
    assert head[1] < 128
    return head[0] >> 4, stream.recv(head[1], socket.MSG_WAITALL) if head[1] else b""


def serve(listener: socket.socket, acknowledged: "queue.Queue[int]") -> None:
    stream, _ = listener.accept()
    with stream:
        packet(stream)
        stream.sendall(CONNACK)
        _, subscribe = packet(stream)
        stream.sendall(b"\x90\x03" + subscribe[:2] + b"\x01")
        stream.sendall(publish(b"v1/home/\x83/down", 1) + publish(b"v1/home/a/down", 2))
        while len(head := stream.recv(2, socket.MSG_WAITALL)) == 2:
            rest = stream.recv(head[1], socket.MSG_WAITALL) if head[1] else b""
            if head[0] >> 4 == PUBACK_TYPE:
                acknowledged.put(int.from_bytes(rest[:2], "big"))


def test_a_topic_that_is_not_text_is_left_out_and_the_next_message_arrives() -> None:
    acknowledged: queue.Queue[int] = queue.Queue()
    arrived: queue.Queue[str] = queue.Queue()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        broker = threading.Thread(target=serve, args=(listener, acknowledged))
        broker.start()
        port = listener.getsockname()[1]
        link = MqttLink(f"mqtt://a@127.0.0.1:{port}", mqtt_version="3.1.1")
        link.subscribe("v1/home/+/down", lambda topic, _payload: arrived.put(topic))
        link.connect()

        assert arrived.get(timeout=SOON_S) == "v1/home/a/down"
        assert [acknowledged.get(timeout=SOON_S) for _ in range(2)] == [1, 2]

        link.close()
        broker.join()
