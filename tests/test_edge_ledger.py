"""The ledger against the wire: a recording proxy before a real broker, SIGKILL at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from recording_proxy import RecordingProxy

from edge_sdk.link.broker import start_broker
from edge_sdk.link.courier import Courier
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.ledger import Ledger
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import AdapterUpdate
from edge_sdk.wire.seal import Identity

pytestmark = pytest.mark.broker

USERS = {"coordinator": "c-password", "kitchen": "k-password"}
SCRIPT = Path(__file__).with_name("ledger_process.py")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class World:
    """A broker, a proxy before it, a coordinator that takes all, and a device to be killed."""

    folder: Path
    proxy: RecordingProxy
    coordinator: Courier

    def device(self, *, seed: int, count: int) -> "subprocess.Popen[bytes]":
        url = f"mqtt://kitchen:{USERS['kitchen']}@127.0.0.1:{self.proxy.port}"
        command = [sys.executable, str(SCRIPT), str(self.folder), url, str(seed), str(count)]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def taken(self) -> int:
        return len(self.coordinator.mailbox.unread())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    device, identity = Identity.generate(), Identity.generate()
    (tmp_path / "device.key").write_bytes(device.to_bytes())
    (tmp_path / "coordinator.pub").write_bytes(identity.public.to_bytes())
    broker = start_broker(tmp_path / "broker", users=USERS)
    port = urlsplit(broker.url).port
    assert port is not None
    proxy = RecordingProxy(port)
    mailbox = Mailbox(tmp_path / "coordinator.db")
    courier = Courier(
        MqttLink(f"mqtt://coordinator:{USERS['coordinator']}@127.0.0.1:{port}"),
        mailbox,
        identity,
        tenant="home",
        me="coordinator",
        lookup={"kitchen": device.public}.get,
        now=time.time,
        rng=random.Random(0),
    )
    courier.start()
    yield World(tmp_path, proxy, courier)
    courier.close()
    mailbox.close()
    proxy.close()
    broker.close()


def test_the_lines_equal_what_the_proxy_saw(world: World) -> None:
    """Number of messages and bytes, message by message; and nothing else holds our fields."""
    assert world.device(seed=3, count=12).wait(30) == 0

    with Mailbox(world.folder / "device.db") as mailbox:
        entries = Ledger(mailbox, time.time).entries()
    assert {entry.stream: entry.wire_bytes for entry in entries} == dict(world.proxy.messages())
    assert len(entries) == world.taken() == 12
    assert all(entry.state == "acknowledged" and entry.whole for entry in entries)
    public = world.coordinator._receiver.identity.public
    assert {entry.key for entry in entries} == {public.receive_id.hex()}
    assert all(set(entry.fields) == set(AdapterUpdate.__struct_fields__) for entry in entries)


def test_killed_at_any_moment_nothing_left_without_a_line(world: World) -> None:
    """What the proxy saw by the time of each kill has a line; at the end all is acknowledged."""
    rng, count, kills = random.Random(11), 30, 0
    while True:
        process = world.device(seed=4, count=count)
        seen = len(world.proxy.payloads())
        goal = seen + rng.randrange(1, 12) if kills < 6 else 1 << 30
        deadline = time.monotonic() + 30
        while process.poll() is None and len(world.proxy.payloads()) < goal:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        over = process.wait() == 0
        with Mailbox(world.folder / "device.db") as mailbox:
            ledger = Ledger(mailbox, time.time)
            ledger.verify()
            lines = {entry.stream for entry in ledger.entries()}
            assert set(world.proxy.messages()) <= lines
            if over:
                entries = ledger.entries()
                break
        kills += 1

    assert kills >= 3
    assert world.taken() == len(entries) == count
    assert all(entry.state == "acknowledged" for entry in entries)
    saw = world.proxy.messages()
    # Of a killed process the bytes are not known: then the line says so and never too much.
    assert all(entry.wire_bytes <= saw[entry.stream] for entry in entries)
    assert all(entry.wire_bytes == saw[entry.stream] for entry in entries if entry.whole)
