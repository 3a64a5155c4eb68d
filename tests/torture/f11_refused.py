"""F11: messages that a broker will not carry: too large, in four ways brokers say so, or forbidden.

Knows mosquitto's settings and what must happen: no reconnect loop, the item set aside with a reason
(or held back where the broker gave none), and the other messages arrive.
"""

import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_sdk.link.broker import Broker, find_mosquitto, start_broker
from edge_sdk.link.courier import Courier
from edge_sdk.link.limits import STRIKES
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import File, Refused
from edge_sdk.wire.seal import Identity
from tests.torture.result import Result, Scale, say

_WAIT_S = 90.0
_QUIET_S = 5.0
"""After all is settled: no connection may be made in this time."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way of not carrying a message; `setting` is added to mosquitto's configuration."""

    name: str
    version: Literal["5", "3.1.1"]
    setting: str
    parked: str
    """What the reason must say; "" where the item is held back, since the broker said nothing."""
    connections: int = 1


CASES = (
    Case("limit in CONNACK", "5", "max_packet_size 40000", "over the broker's limit"),
    Case("refused in PUBACK", "5", "message_size_limit 40000", "Packet too large"),
    Case("cut off", "3.1.1", "max_packet_size 40000", "", connections=2 * STRIKES),
    Case("thrown away", "3.1.1", "message_size_limit 40000", ""),
    Case("not authorized", "5", "acl", "Not authorized"),
)


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Run every case; the short form is the first of them."""
    cases = CASES if scale is Scale.FULL else CASES[:1]
    outcomes = {}
    for number, case in enumerate(cases):
        home = folder / str(number)
        home.mkdir()
        outcomes[case.name] = _outcome(case, home, seed)
        say("F11", f"{case.name}: {outcomes[case.name]}")
    failed = [name for name, outcome in outcomes.items() if not outcome.startswith("ok")]
    loops = sum("reconnects" in outcome for outcome in outcomes.values())
    return Result(
        code="F11",
        title="oversized or refused message",
        value=loops,
        unit="reconnect loops",
        goal="0 reconnect loops, item parked",
        passed=not failed,
        lost=0 if not failed else None,
        doubled=0 if not failed else None,
        command="",
        notes=dict(outcomes),
    )


def _outcome(case: Case, home: Path, seed: int) -> str:
    names = ("coordinator", "device")
    keys = {name: Identity.generate() for name in names}
    public = {name: identity.public for name, identity in keys.items()}
    broker = _broker(case, home)
    links = {
        name: MqttLink(
            broker.url_for(name),
            first_retry_s=0.02,
            last_retry_s=0.2,
            mqtt_version=case.version,
            rng=random.Random(seed),
        )
        for name in names
    }
    mailboxes = {name: Mailbox(home / f"{name}.db") for name in names}
    couriers = {
        name: Courier(
            links[name],
            mailboxes[name],
            keys[name],
            tenant="home",
            me=name,
            lookup=public.get,
            now=time.time,
            rng=random.Random(seed),
            patience_s=0.2,
        )
        for name in names
    }
    try:
        with couriers["coordinator"], couriers["device"] as device:
            data = random.Random(seed).randbytes(300_000)
            big = [device.send("coordinator", File(f"b{n}", "p", data), task=f"b{n}")
                   for n in range(5)]  # fmt: skip
            small = [device.send("coordinator", Refused(f"s{n}", "no"), task=f"s{n}")
                     for n in range(20)]  # fmt: skip
            return _judge(case, links["device"], mailboxes, big, small)
    finally:
        for mailbox in mailboxes.values():
            mailbox.close()
        broker.close()


def _judge(
    case: Case, link: MqttLink, mailboxes: dict[str, Mailbox], big: list[bytes], small: list[bytes]
) -> str:
    mine = mailboxes["device"]

    def parked() -> dict[bytes, str]:
        return {item.stream: item.parked for item in mine.parked()}

    forbidden = case.setting == "acl"
    if forbidden:
        settled = _wait(lambda: all(stream in parked() for stream in (*big, *small)))
    else:
        settled = _wait(lambda: all(mine.posted(stream) is None for stream in small))
        if case.parked:
            settled = settled and _wait(lambda: all(stream in parked() for stream in big))
    if not settled:
        waiting = sum(mine.posted(stream) is not None for stream in small)
        return f"{waiting} small ones still wait, {len(parked())} are parked"
    before = link.connections
    time.sleep(_QUIET_S)
    if link.connections != before or before > case.connections:
        return f"reconnects: {before} connections, then {link.connections - before} more"
    wrong = [reason for reason in parked().values() if case.parked not in reason]
    if wrong:
        return f"a reason that does not say {case.parked!r}: {wrong[0]}"
    letters = {letter.task for letter in mailboxes["coordinator"].unread()}
    if not forbidden and len(letters) != len(small):
        return f"{len(letters)} of {len(small)} small ones arrived"
    state = "parked" if case.parked else "held back"
    return f"ok, {len(big)} {state}, {len(letters)} others arrived, {before} connections"


def _wait(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _broker(case: Case, home: Path) -> Broker:
    users = {"coordinator": "c", "device": "d"}
    broker = start_broker(home / "broker", users=users, prefer="mosquitto")
    broker.close()
    config = home / "broker" / "mosquitto.conf"
    lines = config.read_text().splitlines()
    if case.setting == "acl":
        (home / "broker" / "acl").write_text(
            "user coordinator\ntopic readwrite v1/#\npattern read v1/+/%u/down\n"
        )
    else:
        name = case.setting.split()[0]
        lines = [line for line in lines if not line.startswith(f"{name} ")] + [case.setting]
    config.write_text("\n".join(lines) + "\n")
    command = [find_mosquitto() or "mosquitto", "-c", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Broker("mosquitto", broker.port, process, config.parent, users)
