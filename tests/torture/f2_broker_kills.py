"""F2: the broker is killed with SIGKILL at random moments, under load.

Knows when to kill and how long recovery took. Does not know what is right: the history checker
judges what devices and coordinator wrote down.

As F1, but the coordinator lives and the broker dies; half of the kills are mosquitto's, half the
embedded amqtt's, each as `start_broker` configures it. Recovery is the time from a kill to the
first Commit after it.
"""

import os
import random
import signal
import time
from pathlib import Path
from typing import Literal

from edge_sdk.link.broker import Kind, start_broker
from edge_sdk.link.mqtt import MqttLink
from tests.torture.children import Child
from tests.torture.f1_coordinator_kills import COORDINATOR, DEADLINE_S
from tests.torture.history import Verdict, check
from tests.torture.parties import Device
from tests.torture.result import Result, Scale, say

NAMES = ("a", "b", "c")
NEED = 3
KILLS = {Scale.SHORT: 1, Scale.FULL: 50}
"""For each of the two brokers."""
LATEST_S = 0.5
BYTES = (1_000, 256 * 1024)
BROKERS: tuple[Kind, ...] = ("mosquitto", "amqtt")


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Kill both brokers as often as `scale` says, and judge."""
    value: dict[str, object] = {"kills": 2 * KILLS[scale]}
    notes: dict[str, object] = {}
    verdicts = []
    for kind in BROKERS:
        verdict, recoveries = _one(kind, KILLS[scale], random.Random(f"{seed} {kind}"), folder)
        verdicts.append(verdict)
        value[f"slowest_recovery_s_{kind}"] = round(max(recoveries), 3)
        notes[kind] = str(verdict)
    return Result(
        code="F2",
        title="kill -9 of the broker under load",
        value=value,
        unit="kills",
        goal="100 kills, mosquitto and amqtt, 0 lost, 0 doubled",
        passed=all(v.ok and not v.waiting and not v.held for v in verdicts),
        lost=sum(len(v.lost) for v in verdicts),
        doubled=sum(len(v.doubled) for v in verdicts),
        notes=notes,
    )


def _one(kind: Kind, kills: int, rng: random.Random, folder: Path) -> tuple[Verdict, list[float]]:
    users = {name: f"{name}-secret" for name in (*NAMES, "coordinator")}
    home = folder / kind
    version: Literal["5", "3.1.1"] = "3.1.1" if kind == "amqtt" else "5"
    broker = start_broker(home / "broker", users=users, prefer=kind)
    recoveries = []
    try:
        command = [home / "hq", home / "history", broker.url_for("coordinator"), version, NEED]
        child = Child(COORDINATOR, [*command, *NAMES], folder / "coordinator.log")
        child.wait_for("resumed", DEADLINE_S)
        devices = [
            Device(
                name,
                home / "hq",
                MqttLink(
                    broker.url_for(name),
                    first_retry_s=0.02,
                    last_retry_s=0.2,
                    mqtt_version=version,
                ),
                home / "history",
                size=lambda drawn: drawn.randint(*BYTES),
                seed=rng.randrange(2**31),
            )
            for name in NAMES
        ]
        for device in devices:
            device.start()
        child.wait_for("committed", DEADLINE_S)
        for number in range(1, kills + 1):
            time.sleep(rng.uniform(0.0, LATEST_S))  # the random moment of the kill
            killed = time.monotonic()
            os.kill(broker.pid, signal.SIGKILL)
            broker.close()
            broker = start_broker(home / "broker", users=users, prefer=kind, port=broker.port)
            recoveries.append(child.wait_for("committed", DEADLINE_S, after=killed) - killed)
            if number % 10 == 0:
                say("F2", f"{kind}: {number} of {kills} kills, slowest {max(recoveries):.2f} s")
        child.tell("finish")
        child.wait_for("finished", DEADLINE_S)
        for device in devices:
            device.wait_until_idle(DEADLINE_S)
            device.close()
        child.end(DEADLINE_S)
    finally:
        broker.close()
    return check(home / "history"), recoveries
