"""Couriers over real brokers, with real processes that are really killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_sdk.link.broker import Broker, Kind, find_mosquitto, start_broker
from edge_sdk.link.courier import Courier
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.link.sending import Progress
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import File, decode
from edge_sdk.wire.seal import Identity

pytestmark = pytest.mark.broker
USERS = {"coordinator": "c-secret", "kitchen": "k-secret", "garage": "g-secret"}
KEYS = {name: Identity.generate() for name in USERS}
SOON_S = 20.0
MIB = 1024 * 1024


@pytest.fixture(params=["mosquitto", "amqtt"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    return request.param


@contextmanager
def courier(folder: Path, broker: Broker, name: str, **options) -> Iterator[Courier]:
    version = "3.1.1" if broker.kind == "amqtt" else "5"
    link = MqttLink(
        broker.url_for(name), first_retry_s=0.05, last_retry_s=0.3, mqtt_version=version
    )
    mailbox = Mailbox(folder / f"{name}.db")
    public = {other: identity.public for other, identity in KEYS.items()}
    with Courier(
        link,
        mailbox,
        KEYS[name],
        tenant="home",
        me=name,
        lookup=public.get,
        now=time.time,
        rng=random.Random(1),
        **{"patience_s": 1.0, **options},
    ) as running:
        yield running
    mailbox.close()


def file(task: str, size: int) -> File:
    return File(task_id=task, path="p", data=random.Random(size).randbytes(size))


class Threshold:
    """A progress callback that raises a flag when so many bytes are confirmed or received."""

    def __init__(self, done_bytes: int) -> None:
        self.passed = threading.Event()
        self._done_bytes = done_bytes

    def __call__(self, progress: Progress) -> None:
        if progress.done_bytes >= self._done_bytes:
            self.passed.set()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def test_a_mebibyte_each_way(kind: Kind, tmp_path: Path) -> None:
    with (
        start_broker(tmp_path / "broker", users=USERS, prefer=kind) as broker,
        courier(tmp_path, broker, "coordinator", patience_s=10.0) as coordinator,
        courier(tmp_path, broker, "kitchen", patience_s=10.0) as kitchen,
    ):
        up = kitchen.send("coordinator", file("up", MIB), task="up")
        down = coordinator.send("kitchen", file("down", MIB + 1), task="down")
        kitchen.wait_until_done(up, SOON_S)
        coordinator.wait_until_done(down, SOON_S)

        assert kitchen.wait_for_mail(SOON_S)
        assert [decode(m.message) for m in coordinator.mailbox.unread()] == [file("up", MIB)]
        assert [decode(m.message) for m in kitchen.mailbox.unread()] == [file("down", MIB + 1)]
        assert kitchen.bytes_up["File"] < 1.01 * MIB + 2_000


def test_a_killed_broker_delays_but_loses_nothing(kind: Kind, tmp_path: Path) -> None:
    size = 16 * MIB
    half = Threshold(size // 3)
    broker = start_broker(tmp_path / "broker", users=USERS, prefer=kind)
    with (
        courier(tmp_path, broker, "coordinator", progress=half) as coordinator,
        courier(tmp_path, broker, "kitchen") as kitchen,
        courier(tmp_path, broker, "garage") as garage,
    ):
        streams = [(kitchen, kitchen.send("coordinator", file("up", size), task="up"))]
        streams.append((coordinator, coordinator.send("garage", file("down", MIB), task="down")))
        assert half.passed.wait(SOON_S)

        os.kill(broker.pid, signal.SIGKILL)
        broker.close()
        streams.append((garage, garage.send("coordinator", file("late", MIB), task="late")))
        with start_broker(tmp_path / "broker", users=USERS, prefer=kind, port=broker.port):
            for sender, stream in streams:
                sender.wait_until_done(stream, SOON_S)

            got = [decode(m.message) for m in coordinator.mailbox.unread()]
            assert sorted(m.task_id for m in got) == ["late", "up"]
            assert file("up", size) in got
            assert kitchen.bytes_up["File"] < size + 4 * MIB


def test_a_killed_device_resumes_without_sending_everything_again(
    kind: Kind, tmp_path: Path
) -> None:
    size = 24 * MIB
    half = Threshold(size // 2)
    (tmp_path / "device.key").write_bytes(KEYS["kitchen"].to_bytes())
    (tmp_path / "coordinator.pub").write_bytes(KEYS["coordinator"].public.to_bytes())
    with (
        start_broker(tmp_path / "broker", users=USERS, prefer=kind) as broker,
        courier(tmp_path, broker, "coordinator", progress=half) as coordinator,
    ):
        script = Path(__file__).with_name("courier_process.py")
        command = [sys.executable, str(script), str(tmp_path), broker.url_for("kitchen")]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        first = subprocess.Popen([*command, str(size)], env=environment)
        assert half.passed.wait(SOON_S)
        first.kill()
        first.wait()
        assert coordinator.mailbox.unread() == []

        subprocess.run(command, env=environment, timeout=SOON_S, check=True)
        wait_for(lambda: len(coordinator.mailbox.unread()) == 1)

        assert decode(coordinator.mailbox.unread()[0].message) == file("t", size)
        assert coordinator.bytes_up["File"] < size + 4 * MIB  # about half would come twice
