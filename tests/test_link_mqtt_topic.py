"""A link outlives what a bad network makes of topics and subscriptions (found by torture F4)."""

import queue
import socket
import threading

import pytest

from edge_sdk.link import mqtt
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


def forget_one(listener: socket.socket, over: threading.Event) -> None:
    """Never confirm the first connection's subscription; confirm the second's."""
    for confirm in (False, True):
        stream, _ = listener.accept()
        with stream:
            packet(stream)
            stream.sendall(CONNACK)
            _, subscribe = packet(stream)
            if confirm:
                stream.sendall(b"\x90\x03" + subscribe[:2] + b"\x01")
                over.wait(SOON_S)
            else:
                stream.recv(1)  # until the link gives up


def test_a_subscription_that_is_never_confirmed_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mqtt, "_SUBSCRIBED_S", 0.1)
    monkeypatch.setattr(mqtt, "_ANSWER_S", dict.fromkeys(mqtt._ANSWER_S, 0.5))
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        broker = threading.Thread(target=forget_one, args=(listener, over))
        broker.start()
        url = f"mqtt://a@127.0.0.1:{listener.getsockname()[1]}"
        link = MqttLink(url, mqtt_version="3.1.1", first_retry_s=0.01)
        link.subscribe("v1/home/a/down", lambda _topic, _payload: None)

        link.connect(wait_s=SOON_S)

        assert link.connected
        over.set()
        link.close()
        broker.join()


def listen_twice(listener: socket.socket, asked: "queue.Queue[bytes]") -> None:
    stream, _ = listener.accept()
    with stream:
        packet(stream)
        stream.sendall(CONNACK)
        for _ in range(2):
            _, subscribe = packet(stream)
            asked.put(subscribe[2:])
            stream.sendall(b"\x90\x03" + subscribe[:2] + b"\x01")
        stream.recv(1)


def test_one_who_only_listens_confirms_that_he_can_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first SUBSCRIBE may have reached the broker damaged, and been confirmed all the same."""
    monkeypatch.setattr(mqtt, "_REFRESH_S", 0.1)
    asked: queue.Queue[bytes] = queue.Queue()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        broker = threading.Thread(target=listen_twice, args=(listener, asked))
        broker.start()
        link = MqttLink(f"mqtt://a@127.0.0.1:{listener.getsockname()[1]}", mqtt_version="3.1.1")
        link.subscribe("v1/home/a/down", lambda _topic, _payload: None)
        link.connect()

        first, second = (asked.get(timeout=SOON_S) for _ in range(2))

        assert first == second
        link.close()
        broker.join()
