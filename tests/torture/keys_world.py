"""A tenant without models: a real desk, warden and courier, and devices that only have keys.

Knows how these parts fit as the service and the agent fit them. Trains nothing and loads no model,
so that hundreds of lives fit into a minute. Devices send Scores to tasks of their own invention;
what the coordinator accepted is written down in `counted`, in the transaction that accepts it.
"""

import contextlib
import io
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.config import CoordinatorConfig
from coordinator.desk import Desk
from coordinator.warden import Warden
from edge_sdk.cli import main
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import LinkError
from edge_sdk.link.base import Link
from edge_sdk.link.broker import Broker
from edge_sdk.link.courier import Courier
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.link.passwords import COORDINATOR
from edge_sdk.membership import Member
from edge_sdk.memory import DeviceMemory
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.config_rules import parse_toml
from edge_sdk.wire.enrolment import EnrolmentCode
from edge_sdk.wire.messages import (
    AnyMessage,
    Enrol,
    Enrolled,
    Renewed,
    RenewKeys,
    Scores,
    decode,
)
from edge_sdk.wire.seal import Header

SOON_S = 20.0
SETTINGS = """
[service]
tenant = "{tenant}"
state_dir = "{folder}"
enrolment = "{enrolment}"
{more}
[program]
name = "fedavg"
[[families]]
name = "tiny"
path = "none"
[task]
name = "kind"
prompt = "Request: {{text}}\\nKind:"
generation_prompt = "A request ({{label}}):"
labels = ["open", "list", "name"]
words = [" open", " list", " name"]
"""


def settings(folder: Path, tenant: str, enrolment: str = "token") -> CoordinatorConfig:
    """Return settings of a coordinator whose state is in `folder`."""
    text = SETTINGS.format(tenant=tenant, folder=folder, enrolment=enrolment, more="")
    return parse_toml(text, CoordinatorConfig, "torture")


def mqtt(broker: Broker, user: str) -> MqttLink:
    """Return a link of `user` that reconnects quickly."""
    version: Any = "3.1.1" if broker.kind == "amqtt" else "5"
    return MqttLink(
        broker.url_for(user), first_retry_s=0.05, last_retry_s=0.3, mqtt_version=version
    )


def command(*words: object) -> dict[str, Any]:
    """Run a `symbiont` command in this process and return its JSON object."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main([*map(str, words), "--json"])
    found: dict[str, Any] = json.loads(said.getvalue())
    assert code == 0, found
    return found


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(true: Callable[[], object], what: str, timeout_s: float = SOON_S) -> None:
    """Wait until `true()` holds.

    Raises:
        LinkError: it did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise LinkError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(0.01)


@dataclass
class Tenant:
    """A coordinator. `counted` holds (sender, task) of everything accepted, in order."""

    folder: Path
    link: Link
    name: str = "home"
    enrolment: str = "token"
    now: Callable[[], float] = time.time
    counted: list[tuple[str, str]] = field(default_factory=list)
    events: list[dict[str, object]] = field(default_factory=list)
    tuf_root: bytes = b"root"
    replies: list[tuple[str, AnyMessage]] = field(default_factory=list)
    """(sender, message) of everything but enrolments and renewals."""
    config: CoordinatorConfig | None = None
    """Settings to use instead of `folder`, `name` and `enrolment`."""
    times: list[tuple[str, float]] = field(default_factory=list)
    """(sender, monotonic time) of everything accepted."""

    def __post_init__(self) -> None:
        config = self.config or settings(self.folder, self.name, self.enrolment)
        self.desk = Desk(config, now=self.now)
        self.courier = Courier(
            self.link,
            self.desk.mailbox,
            self.desk.ring,
            tenant=self.name,
            me=COORDINATOR,
            lookup=self.desk.fleet.lookup,
            now=self.now,
            rng=random.Random(1),
            accept=self._accept,
            admit=self.desk.fleet.admit,
            patience_s=0.3,
        )
        told: Any = lambda event, **more: self.events.append({"event": event, **more})  # noqa: E731
        self.warden = Warden(self.desk, self.courier, told)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> "Tenant":
        """Connect, announce the keys and answer enrolments from now on."""
        self.courier.start()
        self.warden.announce()
        self._thread.start()
        return self

    def code(self, device: str, *, lasts_s: float = 600.0) -> EnrolmentCode:
        """Return a one-time code."""
        return self.desk.token(device, lasts_s=lasts_s)

    def send(self, device: str, message: AnyMessage, task: str) -> bytes:
        """Send a message and return its stream."""
        return self.courier.send(device, message, task=task)

    def close(self) -> None:
        """Stop everything."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self.courier.close()
        self.desk.close()

    def _accept(self, header: Header, message: AnyMessage) -> None:
        if isinstance(message, RenewKeys):
            self.desk.fleet.renew(header.sender, message)
        self.counted.append((header.sender, header.task))
        self.times.append((header.sender, time.monotonic()))

    def _certificate(self, device: str, csr: bytes) -> bytes:
        return self.desk.authority.certify(device, csr) if csr else b""

    def _serve(self) -> None:
        while not self._closing.is_set():
            self.courier.wait_for_mail(0.1)
            for letter in self.desk.mailbox.unread():
                message = decode(bytes(letter.message))
                if isinstance(message, Enrol) and self.desk.fleet.is_active(message.device):
                    pem = self._certificate(message.device, message.csr)
                    task = self.desk.config.task
                    answer = Enrolled(message.device, self.tuf_root, task, pem)
                    self.courier.send(message.device, answer, task=letter.task)
                elif isinstance(message, RenewKeys):
                    pem = self._certificate(letter.sender, message.csr)
                    renewed = Renewed(message.task_id, pem)
                    self.courier.send(letter.sender, renewed, task=letter.task)
                elif not isinstance(message, Enrol):
                    self.replies.append((letter.sender, message))
                self.desk.mailbox.mark_read(letter.id)


class Device:
    """A device's membership, keys and mail. `clock` replaces its monotonic clock."""

    def __init__(
        self, folder: Path, link: Link, *, clock: Callable[[], float] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.link, self.read = link, list[AnyMessage]()
        self.mailbox = Mailbox(folder / "mailbox.db")
        config = EdgeConfig()
        self.member = Member(config, self.mailbox, DeviceMemory(self.mailbox), folder, clock=clock)
        self.courier: Courier | None = None
        self.failure: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def open(self) -> Courier:
        """Connect as the member that this device is."""
        self.member.open()
        found = self.member.membership
        assert found is not None
        self.courier = Courier(
            self.link,
            self.mailbox,
            self.member.ring,
            tenant=found.tenant,
            me=found.device,
            lookup=self.member.keys.announced,
            now=self.member.time,
            rng=random.Random(2),
            accept=lambda header, _: self.member.time.heard(header.created_s),
            keys=self.member.keys.receive,
            patience_s=0.3,
        )
        self.courier.start()
        self._thread.start()
        return self.courier

    def enrol(self, code: EnrolmentCode, *, timeout_s: float = SOON_S) -> "Device":
        """Join, as EdgeDevice.enrol does.

        Raises:
            EnrolmentError: the code is refused.
            LinkError: no answer in time.
        """
        self.ask(code, timeout_s=timeout_s)
        until(lambda: self.member.complete, f"the answer to {code.device}", timeout_s)
        return self

    def ask(self, code: EnrolmentCode, *, timeout_s: float = SOON_S) -> None:
        """Send the request and return once the coordinator has it.

        Raises:
            EnrolmentError: the code is refused.
            LinkError: no answer in time.
        """
        self.member.begin(code)
        courier = self.courier or self.open()
        self.member.keys.wait(timeout_s)
        courier.wait_until_done(self.member.request(code, courier), timeout_s)

    def say(self, task: str, size: int) -> bytes:
        """Send Scores of about `size` bytes and return the stream."""
        assert self.courier is not None
        return self.courier.send(COORDINATOR, Scores(task, (0.5,) * (size // 9)), task=task)

    def waiting(self) -> int:
        """How many messages the coordinator has not confirmed yet."""
        return len(self.mailbox.pending())

    def close(self) -> None:
        """Stop everything."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.courier is not None:
            self.courier.close()
        self.mailbox.close()

    def _serve(self) -> None:
        assert self.courier is not None
        try:
            while not self._closing.is_set():
                self.courier.wait_for_mail(0.1)
                self.member.upkeep(self.courier)
                for letter in self.mailbox.unread():
                    message = decode(bytes(letter.message))
                    if isinstance(message, Enrolled):
                        self.member.take(message)
                    elif isinstance(message, Renewed):
                        self.member.renewed(message)
                    self.read.append(message)
                    self.mailbox.mark_read(letter.id)
                self.courier.nudge()
        except BaseException as exc:
            self.failure = exc
            raise
