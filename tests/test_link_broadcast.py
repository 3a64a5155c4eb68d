"""One message to many devices: encrypted once, with a wrap and a signature for each."""

import random
from pathlib import Path

from edge_sdk.link.courier import Courier
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire import seal as seal_module
from edge_sdk.wire.messages import File, Score, decode
from edge_sdk.wire.seal import Identity
from edge_sdk.wire.transfer import Chunk, Offer, decode_frame

NAMES = ("coordinator", "cellar", "garden", "kitchen")


class Village:
    """A coordinator and three devices, one of them with a hybrid key, and what the broker sees."""

    def __init__(self, folder: Path) -> None:
        self.time_s = 0.0
        self.folder = folder
        self.keys = {name: Identity.generate(hybrid=name == "kitchen") for name in NAMES}
        self.broker = MemoryBroker(rng=random.Random(1))
        self.offers: dict[tuple[str, str], bytes] = {}
        self.chunks: dict[str, set[bytes]] = {name: set() for name in NAMES}
        spy = self.broker.link("spy")
        spy.subscribe("v1/home/+/down", self._see)
        spy.connect()
        self.parties = {name: self.open(name) for name in NAMES}

    def open(self, name: str) -> Courier:
        link = self.broker.link(name)
        courier = Courier(
            link,
            Mailbox(self.folder / f"{name}.db"),
            self.keys[name],
            tenant="home",
            me=name,
            lookup=lambda who: self.keys[who].public if who in self.keys else None,
            now=lambda: 1_800_000_000.0,
            rng=random.Random(2),
            clock=lambda: self.time_s,
        )
        link.connect()
        return courier

    def _see(self, topic: str, payload: bytes) -> None:
        name = topic.split("/")[2]
        frame = decode_frame(payload)
        if isinstance(frame, Offer):
            kind = seal_module.peek_header(frame.manifest).kind
            self.offers[name, kind] = frame.manifest
        elif isinstance(frame, Chunk):
            self.chunks[name].add(frame.data)

    def settle(self) -> None:
        for _ in range(400):
            for party in self.parties.values():
                party.step()
            self.time_s += 0.25
            if not any(party.mailbox.pending() for party in self.parties.values()):
                return
        raise AssertionError("not everything arrived")


def test_one_message_to_many_is_one_body_with_a_wrap_each(tmp_path):
    village = Village(tmp_path)
    message = File("t", "model", random.Random(3).randbytes(150_000))
    coordinator = village.parties["coordinator"]

    for name in NAMES[1:]:
        coordinator.send(name, message, task="t")
    village.settle()

    parts = [seal_module._split(village.offers[name, "File"]) for name in NAMES[1:]]
    assert len({hashes for _, _, hashes, _ in parts}) == 1
    assert len({wrap for _, wrap, _, _ in parts}) == 3
    assert [header.suite for header, *_ in parts] == [1, 1, 2]
    assert village.chunks["cellar"] == village.chunks["garden"] == village.chunks["kitchen"]
    for name in NAMES[1:]:
        (letter,) = village.parties[name].mailbox.unread()
        assert decode(letter.message) == message


def test_different_messages_or_tasks_share_nothing(tmp_path):
    village = Village(tmp_path)
    coordinator = village.parties["coordinator"]

    coordinator.send("cellar", Score("t", "base", ("one",), ("a",)), task="t")
    coordinator.send("garden", Score("t", "base", ("two",), ("a",)), task="t")
    coordinator.send("kitchen", Score("t", "base", ("one",), ("a",)), task="u")
    village.settle()

    hashes = {seal_module._split(village.offers[name, "Score"])[2] for name in NAMES[1:]}
    assert len(hashes) == 3
    assert not village.chunks["cellar"] & village.chunks["kitchen"]


def test_a_broadcast_goes_on_after_a_restart(tmp_path):
    village = Village(tmp_path)
    message = File("t", "model", random.Random(4).randbytes(100_000))
    village.parties["garden"]._link.close()
    for name in NAMES[1:]:
        village.parties["coordinator"].send(name, message, task="t")
    for _ in range(40):
        for name in ("coordinator", "cellar", "kitchen"):
            village.parties[name].step()
        village.time_s += 0.25

    village.parties["coordinator"]._link.close()
    village.parties["coordinator"].mailbox.close()
    village.parties["coordinator"] = village.open("coordinator")
    village.parties["garden"]._link.connect()
    village.settle()

    for name in NAMES[1:]:
        (letter,) = village.parties[name].mailbox.unread()
        assert decode(letter.message) == message
