"""The in-memory broker: faithful by default, a bad network on request, the same one each time."""

import random

import pytest

from edge_sdk.errors import LinkError
from edge_sdk.link.base import matches
from edge_sdk.link.memory import Faults, MemoryBroker


def test_a_message_reaches_every_subscriber_and_nobody_else() -> None:
    broker = MemoryBroker()
    a, b, c = broker.link("a"), broker.link("b"), broker.link("c")
    got: list[tuple[str, str, bytes]] = []
    b.subscribe("v1/t/+/up", lambda topic, data: got.append(("b", topic, data)))
    c.subscribe("v1/other/#", lambda topic, data: got.append(("c", topic, data)))
    for link in (a, b, c):
        link.connect()

    a.publish("v1/t/a/up", b"hello")

    assert got == [("b", "v1/t/a/up", b"hello")]


def test_a_retained_message_reaches_those_who_come_later() -> None:
    broker = MemoryBroker()
    a, late = broker.link("a"), broker.link("late")
    a.connect()
    a.publish("v1/t/coordinator/keys", b"old", retain=True)
    a.publish("v1/t/coordinator/keys", b"new", retain=True)
    got: list[bytes] = []

    late.subscribe("v1/t/coordinator/keys", lambda _, data: got.append(data))
    late.connect()

    assert got == [b"new"]


def test_a_cut_link_refuses_to_publish_and_misses_what_is_sent() -> None:
    broker = MemoryBroker()
    a, b = broker.link("a"), broker.link("b")
    got: list[bytes] = []
    ups: list[bool] = []
    b.subscribe("x", lambda _, data: got.append(data))
    b.on_connect(lambda: ups.append(b.connected))
    a.connect()
    b.connect()

    b.cut()
    a.publish("x", b"lost")
    with pytest.raises(LinkError, match="not connected"):
        b.publish("x", b"never")
    b.connect()
    a.publish("x", b"arrives")

    assert got == [b"arrives"]
    assert ups == [True, True]


def test_an_oversized_payload_is_refused_before_it_is_sent() -> None:
    broker = MemoryBroker()
    a = broker.link("a", max_payload=10)
    a.connect()

    with pytest.raises(LinkError, match="takes 10 bytes, not 11"):
        a.publish("x", b"x" * 11)

    assert broker.delivered == 0


def test_faults_lose_repeat_and_reorder_and_are_the_same_for_one_seed() -> None:
    def run() -> list[int]:
        faults = Faults(lose=0.1, duplicate=0.1, delay=0.2)
        broker = MemoryBroker(faults=faults, rng=random.Random(7))
        a, b = broker.link("a"), broker.link("b")
        got: list[int] = []
        b.subscribe("x", lambda _, data: got.append(data[0]))
        a.connect()
        b.connect()
        for i in range(200):
            a.publish("x", bytes([i]))
        broker.flush()
        return got

    got = run()

    assert got == run()
    assert len(set(got)) < 200
    assert len(got) > len(set(got))
    assert got != sorted(got)


@pytest.mark.parametrize(
    ("topic", "pattern", "covered"),
    [
        ("v1/t/d/up", "v1/t/d/up", True),
        ("v1/t/d/up", "v1/t/+/up", True),
        ("v1/t/d/up", "v1/#", True),
        ("v1/t/d", "v1/t/+/up", False),
        ("v1/t/d/up/x", "v1/t/+/up", False),
        ("v1/t/d/down", "v1/t/+/up", False),
        ("v1", "v1/#", True),
    ],
)
def test_topic_filters(topic: str, pattern: str, covered: bool) -> None:
    assert matches(topic, pattern) is covered
