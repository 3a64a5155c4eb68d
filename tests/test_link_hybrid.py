"""Suite 2 end to end: whoever has a hybrid key is sealed to with it, from enrolment on."""

import random
from pathlib import Path

import pytest

from coordinator.fleet import Fleet
from coordinator.store import Store
from edge_sdk.config import EdgeConfig
from edge_sdk.link.courier import Courier
from edge_sdk.link.keys import CoordinatorKeys
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.store.keyring import Keyring
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.config_rules import parse_toml
from edge_sdk.wire.enrolment import root_key_hash, sign_bundle
from edge_sdk.wire.messages import Enrol, Refused, Score, decode
from edge_sdk.wire.seal import Identity, peek_header
from edge_sdk.wire.transfer import Offer, decode_frame

NOW_S = 1_800_000_000.0


class Home:
    """A coordinator with a real fleet, one device, and a spy that reads the headers."""

    def __init__(self, folder: Path, *, coordinator_hybrid: bool, device_hybrid: bool) -> None:
        self.time_s = 0.0
        self.suites: dict[tuple[str, str], int] = {}
        broker = MemoryBroker(rng=random.Random(1))
        spy = broker.link("spy")
        spy.subscribe("v1/home/#", self._see)
        spy.connect()
        root = Identity.generate()
        boxes = {name: Mailbox(folder / f"{name}.db") for name in ("coordinator", "kitchen")}
        self.fleet = Fleet(
            Store(boxes["coordinator"], lambda: NOW_S), tenant="home", now=lambda: NOW_S
        )
        rings = {
            "coordinator": Keyring(folder / "coordinator.key", hybrid=coordinator_hybrid),
            "kitchen": Keyring(folder / "kitchen.key", hybrid=device_hybrid),
        }
        keys = CoordinatorKeys("home", root_key_hash(root.public), now=lambda: NOW_S)
        self.parties = {
            name: Courier(
                broker.link(name),
                boxes[name],
                rings[name],
                tenant="home",
                me=name,
                now=lambda: NOW_S,
                rng=random.Random(2),
                clock=lambda: self.time_s,
                **options,
            )
            for name, options in {
                "coordinator": {"lookup": self.fleet.lookup, "admit": self.fleet.admit},
                "kitchen": {"lookup": keys.lookup, "keys": keys.receive},
            }.items()
        }
        for party in self.parties.values():
            party._link.connect()
        bundle = sign_bundle(
            root,
            rings["coordinator"].public,
            tenant="home",
            version=1,
            expires_s=int(NOW_S) + 100,
        )
        self.parties["coordinator"].announce_keys(bundle)
        code = self.fleet.token("kitchen", root_key_hash=root_key_hash(root.public))
        public = rings["kitchen"].public
        self.request = Enrol(
            code.token_id,
            code.secret,
            "kitchen",
            public.sign,
            public.receive,
            (),
            512,
            hybrid_key=public.hybrid,
        )

    def _see(self, topic: str, payload: bytes) -> None:
        if payload and not topic.endswith("/keys"):
            frame = decode_frame(payload)
            if isinstance(frame, Offer):
                header = peek_header(frame.manifest)
                self.suites[header.recipient, header.kind] = header.suite

    def settle(self) -> None:
        for _ in range(400):
            for party in self.parties.values():
                party.step()
            self.time_s += 0.25
            if not any(party.mailbox.pending() for party in self.parties.values()):
                return
        raise AssertionError("not everything arrived")


@pytest.mark.parametrize("coordinator_hybrid", [False, True])
@pytest.mark.parametrize("device_hybrid", [False, True])
def test_each_direction_uses_the_strongest_key_of_its_receiver(
    tmp_path, coordinator_hybrid, device_hybrid
):
    home = Home(tmp_path, coordinator_hybrid=coordinator_hybrid, device_hybrid=device_hybrid)
    coordinator, kitchen = home.parties["coordinator"], home.parties["kitchen"]

    kitchen.send("coordinator", home.request, task="enrol")
    home.settle()
    coordinator.send("kitchen", Score("t", "base", ("a text",), ("a",)), task="t")
    kitchen.send("coordinator", Refused("t", "no memory"), task="t")
    home.settle()

    up, down = 1 + coordinator_hybrid, 1 + device_hybrid
    assert home.suites == {
        ("coordinator", "Enrol"): up,
        ("coordinator", "Refused"): up,
        ("kitchen", "Score"): down,
    }
    known = home.fleet.get("kitchen")
    assert known is not None
    assert bool(known.public.hybrid) == device_hybrid
    (letter,) = kitchen.mailbox.unread()
    assert decode(letter.message) == Score("t", "base", ("a text",), ("a",))


def test_an_enrolment_with_a_hybrid_key_nobody_can_use_is_refused(tmp_path):
    home = Home(tmp_path, coordinator_hybrid=False, device_hybrid=True)
    kitchen = home.parties["kitchen"]
    bad = Enrol(
        **{name: getattr(home.request, name) for name in home.request.__struct_fields__}
        | {"hybrid_key": b"\xff" * 1216}
    )

    stream = kitchen.send("coordinator", bad, task="enrol")
    home.settle()

    assert kitchen.mailbox.posted(stream).parked
    assert home.fleet.get("kitchen") is None


def test_hybrid_keys_are_off_unless_asked_for():
    assert not parse_toml("", EdgeConfig, "settings").device.hybrid
    assert parse_toml("[device]\nhybrid = true", EdgeConfig, "settings").device.hybrid
