"""Both brokers, one set of rules: who gets in, who may write where, and what the link says."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.errors import ConfigError, LinkError
from edge_sdk.link.broker import Broker, Kind, find_mosquitto, start_broker
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.link.passwords import (
    check_password,
    hash_password,
    may_read,
    may_write,
    read_password_file,
    write_password_file,
)

pytestmark = pytest.mark.broker
USERS = {"coordinator": "c-secret", "kitchen": "k-secret", "garage": "g-secret"}
SOON_S = 10.0


def link_of(broker: Broker, user: str, **options) -> MqttLink:
    version = "3.1.1" if broker.kind == "amqtt" else "5"
    options = {"first_retry_s": 0.05, "last_retry_s": 0.2, "mqtt_version": version, **options}
    return MqttLink(broker.url_for(user), **options)


class Heard:
    """Collects payloads and lets a test wait for the next ones."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self._more = threading.Condition()

    def __call__(self, _topic: str, payload: bytes) -> None:
        with self._more:
            self.payloads.append(payload)
            self._more.notify_all()

    def wait_for(self, count: int) -> bool:
        with self._more:
            return self._more.wait_for(lambda: len(self.payloads) >= count, SOON_S)


@pytest.fixture(scope="module", params=["mosquitto", "amqtt"])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    kind: Kind = request.param
    if kind == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    with start_broker(tmp_path_factory.mktemp(kind), users=USERS, prefer=kind) as running:
        yield running


@pytest.fixture
def coordinator(broker: Broker) -> Iterator[tuple[MqttLink, Heard]]:
    heard = Heard()
    link = link_of(broker, "coordinator")
    link.subscribe("v1/+/+/up", heard)
    link.connect(wait_s=SOON_S)
    yield link, heard
    link.close()


@pytest.fixture
def kitchen(broker: Broker) -> Iterator[tuple[MqttLink, Heard]]:
    heard = Heard()
    link = link_of(broker, "kitchen")
    link.subscribe("v1/home/kitchen/down", heard)
    link.connect(wait_s=SOON_S)
    yield link, heard
    link.close()


def test_messages_pass_both_ways(coordinator, kitchen) -> None:
    coordinator[0].publish("v1/home/kitchen/down", b"task")
    kitchen[0].publish("v1/home/kitchen/up", b"reply")

    assert coordinator[1].wait_for(1)
    assert kitchen[1].wait_for(1)
    assert coordinator[1].payloads == [b"reply"]
    assert kitchen[1].payloads == [b"task"]


def test_a_device_cannot_write_the_topic_of_another(coordinator, kitchen) -> None:
    for topic in ("v1/home/garage/up", "v1/home/garage/down", "v1/home/kitchen/up/more"):
        kitchen[0].publish(topic, b"forged")
    kitchen[0].publish("v1/home/kitchen/up", b"own")

    assert coordinator[1].wait_for(1)
    assert coordinator[1].payloads == [b"own"]


@pytest.mark.parametrize("pattern", ["v1/home/garage/down", "v1/#", "#", "v1/home/+/down"])
def test_a_device_cannot_read_the_topic_of_another(broker, coordinator, pattern) -> None:
    heard, own = Heard(), Heard()
    eavesdropper = link_of(broker, "garage")
    eavesdropper.subscribe("v1/home/garage/down", own)
    eavesdropper.connect(wait_s=SOON_S)
    eavesdropper.subscribe(pattern.replace("garage", "kitchen"), heard)

    coordinator[0].publish("v1/home/kitchen/down", b"not for you")
    coordinator[0].publish("v1/home/garage/down", b"for you")

    assert own.wait_for(1)
    assert b"not for you" not in heard.payloads + own.payloads
    eavesdropper.close()


def test_retained_keys_reach_a_device_that_comes_later(broker, coordinator) -> None:
    coordinator[0].publish("v1/home/coordinator/keys", b"bundle", retain=True)
    heard = Heard()
    late = link_of(broker, "garage")
    late.subscribe("v1/home/coordinator/keys", heard)

    late.connect(wait_s=SOON_S)

    assert heard.wait_for(1)
    assert set(heard.payloads) == {b"bundle"}
    late.close()


@pytest.mark.parametrize("url", ["mqtt://kitchen:wrong@", "mqtt://stranger:k-secret@", "mqtt://"])
def test_a_wrong_password_an_unknown_user_and_no_user_are_refused(broker, url) -> None:
    version = "3.1.1" if broker.kind == "amqtt" else "5"
    link = MqttLink(f"{url}127.0.0.1:{broker.port}", client_id="kitchen", mqtt_version=version)

    with pytest.raises(LinkError, match="refused the connection") as caught:
        link.connect(wait_s=SOON_S)

    assert "wrong" not in str(caught.value)
    assert "k-secret" not in str(caught.value)
    link.close()


def test_a_user_added_later_gets_in(broker, coordinator) -> None:
    broker.add_user("attic", "a-secret")
    link = link_of(broker, "attic")

    link.connect(wait_s=SOON_S)
    link.publish("v1/home/attic/up", b"new here")

    assert coordinator[1].wait_for(1)
    link.close()


def test_an_oversized_message_is_refused_by_the_link_and_the_connection_lives(kitchen) -> None:
    link = kitchen[0]
    before = link.connections

    with pytest.raises(LinkError, match="in one message"):
        link.publish("v1/home/kitchen/up", b"x" * (link.max_payload + 1))

    assert link.connected
    assert link.connections == before


def test_the_link_finds_out_which_mqtt_and_which_limits_the_broker_has(broker) -> None:
    link = link_of(broker, "garage", mqtt_version="5")

    link.connect(wait_s=SOON_S)

    assert link.limits is not None
    found = (link.limits.mqtt_version, link.limits.max_packet_bytes)
    assert found == (("5", 524_288) if broker.kind == "mosquitto" else ("3.1.1", None))
    link.close()


def test_a_flood_is_held_back_by_the_window(broker, coordinator) -> None:
    link = link_of(broker, "garage", window_messages=4)
    link.connect(wait_s=SOON_S)
    largest = 0

    for i in range(60):
        link.publish("v1/home/garage/up", i.to_bytes(2, "big") + b"x" * 60_000)
        largest = max(largest, link._reserved[0])

    assert largest <= 4
    assert coordinator[1].wait_for(60)
    link.close()


@pytest.mark.parametrize("kind", ["mosquitto", "amqtt"])
def test_a_link_returns_after_the_broker_was_killed(kind: Kind, tmp_path: Path) -> None:
    if kind == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    ups = threading.Semaphore(0)
    heard = Heard()
    first = start_broker(tmp_path, users=USERS, prefer=kind)
    link = link_of(first, "coordinator")
    link.subscribe("v1/home/+/up", heard)
    link.on_connect(ups.release)
    link.connect(wait_s=SOON_S)
    assert ups.acquire(timeout=SOON_S)

    os.kill(first.pid, signal.SIGKILL)
    first.close()
    with start_broker(tmp_path, users=USERS, port=first.port, prefer=kind):
        assert ups.acquire(timeout=SOON_S)
        link.publish("v1/home/kitchen/up", b"to myself")

        assert heard.wait_for(1)
        link.close()


def test_an_unreachable_broker_is_named_without_the_password() -> None:
    link = MqttLink("mqtt://kitchen:k-secret@127.0.0.1:1", first_retry_s=0.02, last_retry_s=0.02)

    with pytest.raises(LinkError, match=r"mqtt://kitchen@127.0.0.1:1.*is it running") as caught:
        link.connect(wait_s=0.2)
    with pytest.raises(LinkError, match="not connected"):
        link.publish("x", b"")

    assert "k-secret" not in str(caught.value)
    link.close()


@pytest.mark.parametrize("url", ["http://host", "host:1883", "mqtt://", "mqtt://host:99999"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        MqttLink(url)


def test_certificates_without_tls_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="does not use TLS"):
        MqttLink("mqtt://host", ca="ca.pem")


def test_passwords_are_stored_hashed_and_for_the_owner_only(tmp_path: Path) -> None:
    write_password_file(tmp_path / "passwords", {"kitchen": "k-secret"})

    text = (tmp_path / "passwords").read_text()
    hashed = read_password_file(tmp_path / "passwords")["kitchen"]

    assert "k-secret" not in text
    assert (tmp_path / "passwords").stat().st_mode & 0o777 == 0o600
    assert check_password("k-secret", hashed)
    assert not check_password("k-Secret", hashed)
    assert hash_password("same") != hash_password("same")


@pytest.mark.parametrize("hashed", ["", "plain", "$7$x$y$z", "$6$1$AAAA$AAAA", "$7$1$AAAA$!"])
def test_a_damaged_hash_lets_nobody_in(hashed: str) -> None:
    assert not check_password("", hashed)


def test_access_rules() -> None:
    assert may_write("kitchen", "v1/home/kitchen/up")
    assert may_read("kitchen", "v1/home/kitchen/down")
    assert may_read("kitchen", "v1/home/coordinator/keys")
    assert not may_write("kitchen", "v1/home/coordinator/keys")
    assert not may_write("kitchen", "v1/home/garage/up")
    assert not may_read("kitchen", "v1/home/kitchen/up")
    assert not may_read("kitchen", "v1/home/+/down")
    assert not may_read("kitchen", "v1/home/#")
    assert may_write("coordinator", "v1/home/garage/down")
    assert not may_write("coordinator", "$SYS/x")


@pytest.mark.parametrize("name", ["", "a:b", "a/b", "a+", "#", "a\nb"])
def test_a_user_name_that_would_break_the_files_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        start_broker(tmp_path, users={name: "x"})


def test_a_port_in_use_is_reported_with_the_log(tmp_path: Path) -> None:
    with start_broker(tmp_path / "one", users=USERS) as running:
        with pytest.raises(LinkError, match=r"did not start.*in use"):
            start_broker(tmp_path / "two", users=USERS, port=running.port)
