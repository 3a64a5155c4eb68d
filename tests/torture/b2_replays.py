"""B2: traffic that was recorded once and is sent again, across restarts, is never taken twice.

Knows real couriers and mailboxes on the in-memory broker, and a recorder on it. Does not know how
a repeat is recognised.

Three devices send messages of one and of several chunks while every frame is written down. Then the
recorded frames come again: single, as whole transfers in their order, shuffled, and under the name
of another device; every so often the coordinator dies and starts from its file.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from edge_sdk.link.courier import Courier
from edge_sdk.link.memory import MemoryBroker, MemoryLink
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import AnyMessage, File, Refused
from edge_sdk.wire.seal import Header, Identity, PublicIdentity
from tests.torture.result import Result, Scale, say

TENANT = "home"
NOW_S = 1_800_000_000.0
DEVICES = ("kitchen", "garden", "cellar")
MESSAGES = 20
"""From each device; one in four has several chunks."""
FULL_FRAMES, SHORT_FRAMES = 10_000, 400
RESTARTS = 20
_TURNS = 20_000

Frame = tuple[str, bytes]


class House:
    """A coordinator that dies and comes back, devices, and what was accepted by whom."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.broker = MemoryBroker(rng=random.Random(seed))
        self.time_s = 0.0
        self.accepted: Counter[tuple[str, bytes]] = Counter()
        self.frames: list[Frame] = []
        names = ("coordinator", *DEVICES)
        self.identities = {
            name: Identity.from_bytes(self.rng.randbytes(160 if i % 2 else 64))
            for i, name in enumerate(names)
        }
        self.link: MemoryLink
        self.coordinator: Courier
        self.devices = {name: self._courier(name, self.broker.link(name)) for name in DEVICES}
        self.spy = self.broker.link("spy")
        self.spy.subscribe(f"v1/{TENANT}/+/up", lambda *frame: self.frames.append(frame))

    def lookup(self, name: str) -> PublicIdentity | None:
        """Return a party's public keys."""
        return self.identities[name].public if name in self.identities else None

    def _courier(self, name: str, link: MemoryLink) -> Courier:
        return Courier(
            link,
            Mailbox(self.folder / f"{name}.db"),
            self.identities[name],
            tenant=TENANT,
            me=name,
            lookup=self.lookup,
            now=lambda: NOW_S,
            rng=random.Random(3),
            clock=lambda: self.time_s,
            accept=self._accept if name == "coordinator" else None,
        )

    def _accept(self, header: Header, message: AnyMessage) -> None:
        self.accepted[header.sender, header.stream] += 1

    def start(self) -> None:
        """Start the coordinator from its file."""
        self.link = self.broker.link("coordinator")
        self.coordinator = self._courier("coordinator", self.link)
        self.link.connect()
        self.coordinator.step()

    def die(self) -> None:
        """As if the process was killed: only the file stays."""
        self.link.cut()
        self.coordinator.mailbox.close()

    def work(self, until: Callable[[], bool]) -> None:
        """Turn all workers until `until`."""
        for _ in range(_TURNS):
            if until():
                return
            for courier in (self.coordinator, *self.devices.values()):
                courier.step()
            self.time_s += 0.25
        raise AssertionError("the honest messages did not arrive")


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Record, then replay; count what was taken a second time."""
    wanted = FULL_FRAMES if scale is Scale.FULL else SHORT_FRAMES
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # thousands of refusals, one line each
    try:
        return _measure(House(folder, seed), wanted)
    finally:
        logging.disable(before)


def _measure(house: House, wanted: int) -> Result:
    house.start()
    sent = _record(house)
    honest = dict(house.accepted)
    for courier in house.devices.values():
        courier.mailbox.close()
    replayed, restarts = _replay(house, wanted)
    unread = len(house.coordinator.mailbox.unread())
    house.die()
    doubled = house.accepted.total() - len(honest)
    lost = sent - len(honest)
    return Result(
        "B2",
        "replays across restarts",
        doubled,
        f"accepted of {replayed} replayed frames",
        "0 accepted",
        doubled == 0 and lost == 0 and unread == sent and replayed >= wanted,
        lost=lost,
        doubled=doubled,
        notes={"messages": sent, "recorded frames": len(house.frames), "restarts": restarts},
    )


def _record(house: House) -> int:
    house.spy.connect()
    for courier in house.devices.values():
        courier._link.connect()
    for number in range(MESSAGES):
        for name, courier in house.devices.items():
            message: AnyMessage = Refused(f"task-{number}", f"no reason of {name}")
            if number % 4 == 0:
                data = house.rng.randbytes(150_000)
                message = File(task_id=f"task-{number}", path="a", data=data)
            courier.send("coordinator", message, task=f"task-{number}")
    house.work(lambda: not any(c.mailbox.pending() for c in house.devices.values()))
    house.spy.cut()
    for courier in house.devices.values():
        courier._link.close()
    return MESSAGES * len(house.devices)


def _replay(house: House, wanted: int) -> tuple[int, int]:
    attacker = house.broker.link("attacker")
    attacker.connect()
    replayed = restarts = 0
    while replayed < wanted:
        for topic, payload in _burst(house):
            attacker.publish(topic, payload)
            replayed += 1
            if house.rng.random() < 0.3:
                house.coordinator.step()
        house.coordinator.step()
        house.time_s += 1.0
        if replayed >= (restarts + 1) * wanted // RESTARTS:
            house.die()
            house.start()
            restarts += 1
            if restarts % 5 == 0:
                say("B2", f"{replayed} replayed, {restarts} restarts")
    return replayed, restarts


def _burst(house: House) -> list[Frame]:
    """A few dozen recorded frames in one of the orders an attacker may choose."""
    rng, frames = house.rng, house.frames
    start = rng.randrange(len(frames))
    burst = frames[start : start + rng.randrange(10, 60)]
    match rng.randrange(4):
        case 0:
            rng.shuffle(burst)
        case 1:  # all of one transfer, from its offer on
            stream = rng.choice(frames)[1][1:17]
            burst = [frame for frame in frames if frame[1][1:17] == stream]
        case 2:  # under the name of another device
            topic = rng.choice(frames)[0]
            burst = [(topic, payload) for _, payload in burst]
    return burst
