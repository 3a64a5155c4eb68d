"""B9: a revoked device is heard no more from that moment, and its live session ends within seconds.

Knows the commands: a broker is configured by `symbiont broker config` and started as it is, devices
get their codes and broker passwords from `symbiont device token`, and one after the other is
revoked by `symbiont device revoke` in a process of its own, while it sends without pause to a
coordinator that runs here. The moment of revocation is when the row changes in the database.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.config import CoordinatorConfig
from edge_sdk.link.broker import find_mosquitto, start_broker
from edge_sdk.link.dial import dial
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.wire.enrolment import EnrolmentCode
from tests.torture.keys_world import SETTINGS, Device, Tenant, command, free_port, mqtt, until
from tests.torture.mutual_world import Town
from tests.torture.result import Result, Scale, say

ACCEPT_LIMIT_S, SESSION_LIMIT_S = 1.0, 10.0


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Revoke devices while they send; see the module's text."""
    devices = 10 if scale is Scale.FULL else 2
    closed: dict[str, list[float]] = {}
    late: dict[str, list[float]] = {}
    problems: list[str] = []
    if find_mosquitto():
        closed["mosquitto"], late["mosquitto"] = [], []
        with _operators_broker(folder) as config:
            tenant = Tenant(folder, _coordinator(config), config=config).start()
            for number in range(devices):
                figures = _revoke_one(tenant, folder, f"device-{number}", problems)
                closed["mosquitto"].append(figures[0])
                late["mosquitto"].append(figures[1])
                say(
                    "B9",
                    f"device {number}: session {figures[0]:.2f} s, envelope {figures[1]:.2f} s",
                )
            tenant.close()
        closed["mosquitto, mutual TLS"] = _mutual(folder / "mutual", devices, problems)
        say("B9", f"mutual TLS: sessions {closed['mosquitto, mutual TLS']}")
    closed["amqtt"] = [_embedded(folder / "amqtt")]
    worst_session = max(max(each) for each in closed.values())
    worst_accept = max((max(each) for each in late.values()), default=0.0)
    fine = worst_session < SESSION_LIMIT_S and worst_accept < ACCEPT_LIMIT_S and not problems
    return Result(
        code="B9",
        title="revocation of a live session",
        value={
            "session_closed_s": round(worst_session, 3),
            "last_accepted_after_s": round(worst_accept, 3),
        },
        unit="s, worst",
        goal="no envelope accepted > 1 s after, session closed < 10 s",
        passed=fine,
        notes={
            "sessions_s": {kind: [round(s, 3) for s in each] for kind, each in closed.items()},
            "problems": problems,
        },
    )


def _revoke_one(
    tenant: Tenant, folder: Path, name: str, problems: list[str]
) -> tuple[float, float]:
    """Seconds from the revocation to the end of the session, and to the last accepted envelope."""
    config_file = folder / "coordinator.toml"
    made = command("device", "token", "--device", name, "--config", config_file)
    password = folder / f"{name}.password"
    password.write_text(str(made["broker_password"]))
    link = dial(tenant.desk.config.service.broker, user=name, password_file=str(password))
    device = Device(folder / name, link)
    device.enrol(EnrolmentCode.from_text(str(made["code"])))
    load = _Sending(device)
    until(lambda: sum(who == name for who, _ in tenant.times) > 20, f"mail of {name}")
    watch = _Watch(tenant, name, link)
    command_line = [sys.executable, "-m", "edge_sdk.cli", "device", "revoke", name]
    command_line += ["--config", str(config_file), "--json"]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    until(lambda: watch.closed_at, "the end of the session", SESSION_LIMIT_S + 5)
    time.sleep(1.0)  # what it still sends in vain
    load.stop()
    tenant.warden.tick()
    last = max(at for who, at in tenant.times if who == name)
    if told.get("session") != "ended":
        problems.append(f"{name}: {told}")
    if name in tenant.desk.fleet.active() or tenant.desk.fleet.lookup(name) is not None:
        problems.append(f"{name} is still in the cohort")
    if tenant.desk.mailbox.pending(name):
        problems.append(f"mail for {name} still waits")
    if link.connected:
        problems.append(f"{name} came back")
    device.close()
    watch.join()
    assert watch.revoked_at is not None
    assert watch.closed_at is not None
    return watch.closed_at - watch.revoked_at, max(0.0, last - watch.revoked_at)


class _Sending:
    """Sends small messages without pause."""

    def __init__(self, device: Device) -> None:
        self._device, self._stop = device, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        number = 0
        while not self._stop.wait(0.01):
            if self._device.waiting() < 4:
                number += 1
                self._device.say(f"mail-{number}", 2_000)


class _Watch:
    """Notes when the row changes and when the link is cut."""

    def __init__(self, tenant: Tenant, name: str, link: MqttLink) -> None:
        self.revoked_at: float | None = None
        self.closed_at: float | None = None
        self._tenant, self._name, self._link = tenant, name, link
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _look(self) -> None:
        until(lambda: self._tenant.desk.fleet.lookup(self._name) is None, "the revocation", 60.0)
        self.revoked_at = time.monotonic()
        until(lambda: not self._link.connected, "the end of the session", 60.0)
        self.closed_at = time.monotonic()


def _mutual(folder: Path, devices: int, problems: list[str]) -> list[float]:
    """Seconds until the sessions of devices with certificates have ended, by take-over."""
    folder.mkdir()
    town, closed = Town(folder), []
    for number in range(devices):
        name = f"device-{number}"
        with town.device(name) as device:
            device.run_in_background()
            until(lambda d=device: d.status()["connected"], f"the connection of {name}")
            began = time.monotonic()
            told = command("device", "revoke", name, "--config", town.file)
            until(lambda d=device: not d.status()["connected"], f"the end of {name}", 15.0)
            closed.append(time.monotonic() - began)
            if told["session"] != "ended":
                problems.append(f"{name}: {told}")
            time.sleep(0.5)
            if device.status()["connected"]:
                problems.append(f"{name} came back with its certificate")
    town.close()
    return closed


def _embedded(folder: Path) -> float:
    """Seconds until the broker in Python has ended the session of somebody who left its list."""
    with start_broker(folder, users={"coordinator": "c", "kitchen": "k"}, prefer="amqtt") as broker:
        link = mqtt(broker, "kitchen")
        link.connect(wait_s=10.0)
        began = time.monotonic()
        broker.drop_user("kitchen")
        until(lambda: not link.connected, "amqtt's end of the session")
        took = time.monotonic() - began
        link.close()
    return took


@contextmanager
def _operators_broker(folder: Path) -> Iterator[CoordinatorConfig]:
    """A broker as `broker config` makes it, and the coordinator's settings for it."""
    home, file = folder / "broker", folder / "coordinator.toml"
    made = command("broker", "config", "--out", home, "--port", free_port())
    more = "\n".join(
        f'{key.removeprefix("service.")} = "{value}"' for key, value in made["settings"].items()
    )
    file.write_text(
        SETTINGS.format(tenant="home", folder=folder / "cloud", enrolment="token", more=more)
    )
    mosquitto = find_mosquitto()
    assert mosquitto is not None
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([mosquitto, "-c", str(made["config"])], stderr=log)
    try:
        until(lambda: (home / "mosquitto.pid").exists(), "the broker")
        yield CoordinatorConfig.load(file)
    finally:
        process.terminate()
        process.wait()


def _coordinator(config: CoordinatorConfig) -> MqttLink:
    service = config.service
    return dial(service.broker, user=service.username, password_file=service.password_file)
