"""F1: the coordinator is killed with SIGKILL at random moments, under load.

Knows when to kill and how long recovery took. Does not know what is right: the history checker
judges what devices and coordinator wrote down.

Four devices answer every task with up to 256 KiB of sealed update; the coordinator is a process
with the real store, runner and courier behind a real mosquitto. Most kills wait until the new
process has committed a step, then fall at a random moment; the others fall while it starts and
recovers. Recovery is the time from a kill to the first Commit of the next process.
"""

import random
import time
from pathlib import Path

from edge_sdk.link.broker import start_broker
from edge_sdk.link.mqtt import MqttLink
from tests.torture.children import Child
from tests.torture.history import check
from tests.torture.parties import Device
from tests.torture.result import Result, Scale, say

NAMES = ("a", "b", "c", "d")
NEED = 3
KILLS = {Scale.SHORT: 4, Scale.FULL: 200}
RECOVERY_S = 5.0
STARTING_SHARE = 0.2
"""So many of the kills fall while the process still starts or recovers."""
LATEST_S = 0.5
BYTES = (1_000, 256 * 1024)
DEADLINE_S = 60.0
COORDINATOR = "tests.torture.coordinator_child"


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Kill, restart, and judge."""
    rng = random.Random(seed)
    kills = KILLS[scale]
    users = {name: f"{name}-secret" for name in (*NAMES, "coordinator")}
    recoveries: list[float] = []
    with start_broker(folder / "broker", users=users, prefer="mosquitto") as broker:
        at = (folder / "hq", folder / "history")
        command = [*at, broker.url_for("coordinator"), "5", NEED, *NAMES]
        child = Child(COORDINATOR, command, folder / "coordinator.log")
        child.wait_for("resumed", DEADLINE_S)
        devices = [
            Device(
                name,
                at[0],
                MqttLink(broker.url_for(name), first_retry_s=0.02, last_retry_s=0.2),
                at[1],
                size=lambda drawn: drawn.randint(*BYTES),
                seed=seed,
            )
            for name in NAMES
        ]
        for device in devices:
            device.start()
        child.wait_for("committed", DEADLINE_S)
        for number in range(1, kills + 1):
            time.sleep(rng.uniform(0.0, LATEST_S))  # the random moment of the kill
            killed = child.kill()
            child = Child(COORDINATOR, command, folder / "coordinator.log")
            if rng.random() >= STARTING_SHARE or number == kills:
                recoveries.append(child.wait_for("committed", DEADLINE_S) - killed)
            if number % 25 == 0:
                say("F1", f"{number} of {kills} kills, slowest recovery {max(recoveries):.2f} s")
        child.tell("finish")
        child.wait_for("finished", DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        for device in devices:
            device.wait_until_idle(deadline - time.monotonic())
            device.close()
        child.end(DEADLINE_S)
    verdict = check(folder / "history")
    slowest = max(recoveries)
    fine = verdict.ok and not verdict.waiting and not verdict.held
    return Result(
        code="F1",
        title="kill -9 of the coordinator under load",
        value={"kills": kills, "slowest_recovery_s": round(slowest, 3)},
        unit="kills",
        goal="200 kills, 0 lost, 0 doubled, recovery < 5 s",
        passed=fine and slowest < RECOVERY_S,
        lost=len(verdict.lost),
        doubled=len(verdict.doubled),
        notes={
            "history": str(verdict),
            "median_recovery_s": round(sorted(recoveries)[len(recoveries) // 2], 3),
            "recoveries_measured": len(recoveries),
        },
    )
