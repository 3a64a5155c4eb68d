"""Couriers over the in-memory broker: exactly once, whatever is lost, repeated or reordered.

No thread and no clock runs here: `Town.run` turns the couriers' workers by hand and moves time.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_sdk.errors import (
    EnrolmentError,
    LinkError,
    LocalProtocolError,
    RemoteProtocolError,
    StorageError,
)
from edge_sdk.link.courier import PIECE_BYTES, Courier, part
from edge_sdk.link.memory import Faults, MemoryBroker, MemoryLink
from edge_sdk.link.sending import Progress
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import AnyMessage, Enrol, File, Refused, decode
from edge_sdk.wire.seal import Identity, PublicIdentity
from edge_sdk.wire.transfer import Chunk, Done, Want, decode_frame, encode_frame

TENANT = "home"
NOW_S = 1_800_000_000.0


class Party:
    """One courier with its own mailbox file, and what it takes to restart it."""

    def __init__(self, town: "Town", name: str) -> None:
        self.town = town
        self.name = name
        self.identity = Identity.generate()
        self.link: MemoryLink
        self.courier: Courier
        self.mailbox: Mailbox
        self.options: dict = {}
        self.offers: list[bytes] = []

    def open(self, **options) -> "Party":
        self.options = {**self.options, **options}
        self.link = self.town.broker.link(self.name)
        self.mailbox = Mailbox(self.town.folder / f"{self.name}.db")
        self.courier = Courier(
            self.link,
            self.mailbox,
            self.identity,
            tenant=TENANT,
            me=self.name,
            lookup=self.town.lookup,
            now=lambda: self.town.now_s,
            rng=random.Random(3),
            clock=lambda: self.town.time_s,
            **self.options,
        )
        self.link.connect()
        return self

    def die(self) -> None:
        """As if the process ended: nothing in memory survives."""
        self.link.cut()
        self.mailbox.close()

    def letters(self) -> list[AnyMessage]:
        return [decode(letter.message) for letter in self.mailbox.unread()]


class Town:
    """A coordinator, devices, a broker between them and a clock that moves when told to."""

    def __init__(self, folder: Path, faults: Faults | None = None, seed: int = 0) -> None:
        self.folder = folder
        self.time_s = 0.0
        self.now_s = NOW_S
        self.broker = MemoryBroker(faults=faults, rng=random.Random(seed))
        self.keys: dict[str, PublicIdentity] = {}
        self.parties: list[Party] = []
        self.coordinator = self.add("coordinator")

    def add(self, name: str) -> Party:
        party = Party(self, name)
        self.keys[name] = party.identity.public
        self.parties.append(party)
        return party

    def lookup(self, name: str) -> PublicIdentity | None:
        return self.keys.get(name)

    def turn(self) -> None:
        for party in self.parties:
            if party.link.connected:
                party.courier.step()

    def run(self, until: Callable[[], bool], *, limit_s: float = 3_000.0) -> None:
        """Turn all workers until `until`; time passes only when nothing else happens."""
        deadline = self.time_s + limit_s
        while not until():
            before = self.broker.delivered
            self.turn()
            if self.broker.delivered == before:
                self.broker.flush()
                self.time_s += 0.25
            assert self.time_s < deadline, "not finished in time"

    def settle(self) -> None:
        self.run(lambda: all(not party.mailbox.pending() for party in self.parties))


@pytest.fixture
def town(tmp_path: Path) -> Town:
    town = Town(tmp_path)
    town.coordinator.open()
    return town


def refused(task: str) -> Refused:
    return Refused(task_id=task, reason="no reason " + "x" * 50)


def file(task: str, size: int, seed: int = 0) -> File:
    return File(task_id=task, path="a/b", data=random.Random(seed).randbytes(size))


def enrol(party: Party, **changes) -> Enrol:
    fields = {
        "token_id": "token-1",
        "secret": b"s" * 16,
        "device": party.name,
        "identity_key": party.identity.public.sign,
        "receive_key": party.identity.public.receive,
        "families": ("slm",),
        "memory_mb": 100,
    }
    return Enrol(**{**fields, **changes})


# --- delivery -----------------------------------------------------------------------------------


def test_messages_arrive_both_ways_and_leave_the_outbox(town: Town) -> None:
    kitchen = town.add("kitchen").open()

    kitchen.courier.send("coordinator", refused("t1"), task="t1")
    town.coordinator.courier.send("kitchen", file("t2", 300_000), task="t2")
    town.settle()

    assert town.coordinator.letters() == [refused("t1")]
    assert kitchen.letters() == [file("t2", 300_000)]
    assert [letter.sender for letter in kitchen.mailbox.unread()] == ["coordinator"]


@pytest.mark.parametrize("seed", range(6))
def test_everything_arrives_exactly_once_over_a_bad_network(tmp_path: Path, seed: int) -> None:
    town = Town(tmp_path, Faults(lose=0.15, duplicate=0.15, delay=0.15), seed)
    town.coordinator.open()
    devices = [town.add(name).open() for name in ("kitchen", "garage", "attic")]
    rng = random.Random(seed)
    up: dict[str, list[File]] = {}
    down: dict[str, list[File]] = {}

    for device in devices:
        up[device.name] = [file(f"u{i}", rng.randrange(200_000), i) for i in range(4)]
        down[device.name] = [file(f"d{i}", rng.randrange(200_000), i) for i in range(4)]
        for message in up[device.name]:
            device.courier.send("coordinator", message, task=message.task_id)
        for message in down[device.name]:
            town.coordinator.courier.send(device.name, message, task=message.task_id)
    town.settle()

    for device in devices:
        got = [m for m in device.letters() if isinstance(m, File)]
        assert sorted(got, key=lambda m: m.task_id) == down[device.name]
        letters = town.coordinator.mailbox.unread()
        own = [decode(letter.message) for letter in letters if letter.sender == device.name]
        assert sorted(own, key=lambda m: m.task_id) == up[device.name]


def test_a_device_away_for_long_gets_its_mail_when_it_knocks(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    kitchen.link.cut()
    town.coordinator.courier.send("kitchen", refused("t"), task="t")
    for _ in range(10_000):
        town.coordinator.courier.step()
        town.time_s += 1.0
    sent_before = town.coordinator.link.sent_bytes

    kitchen.link.connect()
    town.run(lambda: len(kitchen.letters()) == 1, limit_s=2.0)

    assert town.coordinator.link.sent_bytes - sent_before < 5_000


@pytest.mark.parametrize("size", [0, 5, PIECE_BYTES, 2 * PIECE_BYTES + 3])
def test_a_file_is_sent_in_parts_from_where_it_lies(town: Town, size: int) -> None:
    kitchen = town.add("kitchen").open()
    source = town.folder / "model.bin"
    source.write_bytes(random.Random(1).randbytes(size))
    before = town.coordinator.mailbox.used_bytes()

    parts = town.coordinator.courier.send_file("kitchen", File("t", "a/b", b""), source, task="t")
    assert town.coordinator.mailbox.used_bytes() - before < 50_000
    town.settle()

    got = sorted(kitchen.letters(), key=lambda message: message.offset)
    assert len(got) == parts == max(1, -(-size // PIECE_BYTES))
    assert b"".join(message.data for message in got) == source.read_bytes()
    assert {message.size for message in got} == {size if parts > 1 else 0}


def test_a_file_that_changes_while_it_waits_is_parked_and_others_go_on(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    kitchen.link.cut()
    source = town.folder / "model.bin"
    source.write_bytes(bytes(500_000))
    town.coordinator.courier.send_file("kitchen", File("t", "a/b", b""), source, task="t")
    town.coordinator.courier.send("kitchen", refused("r"), task="r")
    town.turn()

    source.write_bytes(bytes(499_999) + b"x")
    kitchen.link.connect()
    town.settle()

    assert kitchen.letters() == [refused("r")]
    assert "changed" in town.coordinator.mailbox.parked()[0].parked


def test_a_file_that_is_gone_is_parked(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    source = town.folder / "model.bin"
    source.write_bytes(bytes(500_000))
    town.coordinator.courier.send_file("kitchen", File("t", "a/b", b""), source, task="t")
    source.unlink()

    town.settle()

    assert kitchen.letters() == []
    assert "gone" in town.coordinator.mailbox.parked()[0].parked


def test_senders_get_turns_and_none_is_forgotten(town: Town) -> None:
    town.coordinator.die()
    town.coordinator.open(turn_bytes=300_000)
    devices = [town.add(f"d{n}").open() for n in range(12)]
    for device in devices:
        device.courier.send("coordinator", file(device.name, 250_000), task="t")

    most = 0

    def finished() -> bool:
        nonlocal most
        arriving = town.coordinator.courier._receiver.arriving
        most = max(most, len(arriving._transfers))
        return all(not device.mailbox.pending() for device in devices)

    town.run(finished, limit_s=60.0)

    assert most <= 2
    assert len(town.coordinator.letters()) == 12
    for device in devices:
        assert device.courier.bytes_up["File"] < 260_000


def test_a_turn_that_is_not_used_goes_to_others(town: Town) -> None:
    town.coordinator.die()
    town.coordinator.open(turn_bytes=300_000)
    silent = town.add("silent").open()
    silent.courier.send("coordinator", file("s", 250_000), task="s")
    silent.courier.step()
    silent.link.cut()
    town.coordinator.courier.step()
    kitchen = town.add("kitchen").open()
    kitchen.courier.send("coordinator", file("k", 250_000), task="k")

    town.run(lambda: not kitchen.mailbox.pending(), limit_s=30.0)
    silent.link.connect()
    town.settle()

    assert len(town.coordinator.letters()) == 2


def test_an_absent_device_costs_little_and_delays_nobody(town: Town) -> None:
    town.add("gone").open().link.cut()
    kitchen = town.add("kitchen").open()
    for i in range(20):
        town.coordinator.courier.send("gone", file(f"g{i}", 100_000), task=f"g{i}")
    town.coordinator.courier.send("kitchen", file("k", 100_000), task="k")

    town.run(lambda: len(kitchen.letters()) == 1, limit_s=2.0)
    for _ in range(3_600):
        town.coordinator.courier.step()
        town.time_s += 1.0

    assert town.coordinator.courier.bytes_of("gone")[1] < 50_000


def test_the_coordinators_restart_loses_nothing(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    kitchen.courier.send("coordinator", file("t", 5_000_000), task="t")
    town.run(lambda: town.coordinator.courier.bytes_of("kitchen")[0] > 2_500_000)

    town.coordinator.die()
    town.coordinator.open()
    town.settle()

    assert town.coordinator.letters() == [file("t", 5_000_000)]
    assert town.coordinator.courier.bytes_of("kitchen")[0] < 3_600_000  # the rest, not all


def test_a_device_that_restarts_in_mid_upload_resumes(town: Town) -> None:
    size = 4_000_000
    kitchen = town.add("kitchen").open()
    kitchen.courier.send("coordinator", file("t", size), task="t")
    seen: list[int] = []
    town.broker.link("spy")
    town.run(lambda: town.coordinator.courier.bytes_of("kitchen")[0] > size / 2)
    seen.append(town.coordinator.courier.bytes_of("kitchen")[0])

    kitchen.die()
    kitchen.open()
    town.settle()

    assert town.coordinator.letters() == [file("t", size)]
    total = town.coordinator.courier.bytes_of("kitchen")[0]
    assert total - seen[0] < size / 2 + 1_200_000  # one window at most is sent again


def test_one_delivery_when_every_done_is_lost_for_a_while(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    deliver = kitchen.link.receive
    kept: list[bytes] = []

    def without_done(topic: str, payload: bytes) -> None:
        if payload and isinstance(decode_frame(payload), Done) and len(kept) < 3:
            kept.append(payload)
        else:
            deliver(topic, payload)

    kitchen.link.receive = without_done
    kitchen.courier.send("coordinator", file("t", 300_000), task="t")
    town.settle()

    assert len(kept) == 3
    assert town.coordinator.letters() == [file("t", 300_000)]
    assert kitchen.courier.bytes_up["File"] < 310_000  # asked for again, not sent again


# --- the order of trust -------------------------------------------------------------------------


def test_no_done_before_the_message_is_stored_and_success_afterwards(town: Town) -> None:
    full = [True]

    def accept(_header: object, _message: AnyMessage) -> None:
        if full[0]:
            raise StorageError("the disk is full; free some space")

    town.coordinator.die()
    town.coordinator.open(accept=accept)
    kitchen = town.add("kitchen").open()
    stream = kitchen.courier.send("coordinator", file("t", 300_000), task="t")
    for _ in range(200):
        town.turn()
        town.time_s += 0.25
    assert town.coordinator.letters() == []
    assert kitchen.mailbox.pending() == [stream]

    full[0] = False
    town.settle()

    assert town.coordinator.letters() == [file("t", 300_000)]
    assert town.coordinator.courier.bytes_of("kitchen")[0] < 450_000


def test_an_unknown_sender_is_refused_with_a_reason(town: Town) -> None:
    stranger = town.add("stranger").open()
    del town.keys["stranger"]

    stream = stranger.courier.send("coordinator", refused("t"), task="t")
    town.settle()

    assert town.coordinator.letters() == []
    with pytest.raises(RemoteProtocolError, match="not enrolled here, or was revoked"):
        stranger.courier.wait_until_done(stream, 1.0)


def test_a_device_revoked_in_mid_upload_is_refused(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    kitchen.courier.send("coordinator", file("t", 3_000_000), task="t")
    town.run(lambda: town.coordinator.courier.bytes_of("kitchen")[0] > 1_500_000)

    del town.keys["kitchen"]
    town.settle()

    assert town.coordinator.letters() == []
    assert "revoked" in kitchen.mailbox.parked()[0].parked


def test_a_device_cannot_send_as_another(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    garage = town.add("garage")
    garage.identity = kitchen.identity  # kitchen's keys, garage's name
    garage.open()

    garage.courier.send("coordinator", refused("t"), task="t")
    town.settle()

    assert town.coordinator.letters() == []
    assert len(garage.mailbox.parked()) == 1


def test_a_device_has_no_say_in_the_transfers_of_another(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    garage = town.add("garage").open()
    kitchen.link.cut()
    stream = town.coordinator.courier.send("kitchen", file("t", 300_000), task="t")
    town.turn()
    before = town.coordinator.courier.bytes_of("kitchen")

    garage.link.publish("v1/home/garage/up", encode_frame(Want(stream, frozenset({0, 1}))))
    town.turn()

    assert town.coordinator.courier.bytes_of("kitchen") == before


def test_a_second_message_of_a_kind_for_a_task_is_refused(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    kitchen.courier.send("coordinator", refused("t"), task="t")
    town.settle()

    kitchen.courier.send("coordinator", refused("other"), task="t")
    town.settle()

    assert town.coordinator.letters() == [refused("t")]
    assert len(kitchen.mailbox.parked()) == 1


def test_an_expired_message_is_refused(town: Town) -> None:
    kitchen = town.add("kitchen").open(lifetime_s=60.0)
    town.coordinator.link.cut()
    kitchen.courier.send("coordinator", refused("t"), task="t")
    kitchen.courier.step()

    town.now_s += 3_600.0
    town.coordinator.link.connect()
    town.settle()

    assert town.coordinator.letters() == []
    assert "expired" in kitchen.mailbox.parked()[0].parked


def test_a_receiver_with_a_new_key_gets_the_message_sealed_anew(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    town.coordinator.link.cut()
    kitchen.courier.send("coordinator", file("t", 200_000), task="t")
    kitchen.courier.step()
    old = town.coordinator.identity

    town.coordinator.die()
    town.coordinator.identity = Identity(old.signing, Identity.generate().receiving)
    town.coordinator.open()
    for _ in range(40):
        town.turn()
        town.time_s += 0.25
    assert town.coordinator.letters() == []
    town.keys["coordinator"] = town.coordinator.identity.public
    town.settle()

    assert town.coordinator.letters() == [file("t", 200_000)]


def test_foreign_and_damaged_frames_are_counted_and_harm_nobody(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    rng = random.Random(5)
    captured: list[bytes] = []
    original = kitchen.link.publish

    def capture(topic: str, payload: bytes, *, retain: bool = False) -> None:
        captured.append(payload)
        original(topic, payload, retain=retain)

    kitchen.link.publish = capture
    kitchen.courier.send("coordinator", file("t", 200_000), task="t")
    town.settle()

    for _ in range(400):
        noise = bytearray(rng.choice([p for p in captured if p]))
        for _ in range(rng.randrange(1, 4)):
            noise[rng.randrange(min(len(noise), 400))] = rng.randrange(256)
        original("v1/home/kitchen/up", bytes(noise[: rng.randrange(1, len(noise) + 1)]))
    town.turn()
    kitchen.courier.send("coordinator", refused("after"), task="after")
    town.settle()

    assert town.coordinator.courier.malformed["kitchen"] > 0
    assert town.coordinator.letters() == [file("t", 200_000), refused("after")]


def test_a_corrupted_chunk_is_not_kept(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    deliver = town.coordinator.link.receive
    spoiled: list[int] = []

    def spoil(topic: str, payload: bytes) -> None:
        frame = decode_frame(payload) if payload else None
        if isinstance(frame, Chunk) and frame.index == 1 and not spoiled:
            spoiled.append(1)
            payload = payload[:-1] + bytes([payload[-1] ^ 1])
        deliver(topic, payload)

    town.coordinator.link.receive = spoil
    kitchen.courier.send("coordinator", file("t", 300_000), task="t")
    town.settle()

    assert town.coordinator.courier.malformed["kitchen"] == 1
    assert town.coordinator.letters() == [file("t", 300_000)]


def test_what_the_broker_cannot_carry_is_parked_and_the_others_go_on(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    kitchen.link._max_payload = 30_000

    kitchen.courier.send("coordinator", file("big", 100_000), task="big")
    kitchen.courier.send("coordinator", refused("small"), task="small")
    town.settle()

    assert town.coordinator.letters() == [refused("small")]
    assert "over the broker's limit of 30000" in kitchen.mailbox.parked()[0].parked


# --- enrolment ----------------------------------------------------------------------------------


def test_a_device_enrols_with_keys_nobody_knew(town: Town) -> None:
    def admit(message: Enrol, public: PublicIdentity) -> None:
        assert (message.identity_key, message.receive_key) == (public.sign, public.receive)
        town.keys[message.device] = public
        town.coordinator.courier.send(message.device, refused("welcome"), task="welcome")

    town.coordinator.die()
    town.coordinator.open(admit=admit)
    kitchen = town.add("kitchen").open()
    del town.keys["kitchen"]

    stream = kitchen.courier.send("coordinator", enrol(kitchen), task="token-1")
    town.run(lambda: len(kitchen.letters()) == 1)

    kitchen.courier.wait_until_done(stream, 1.0)
    assert kitchen.letters() == [refused("welcome")]


def test_a_refused_enrolment_raises_with_the_coordinators_reason(town: Town) -> None:
    def admit(_message: Enrol, _public: PublicIdentity) -> None:
        raise EnrolmentError("this enrolment code was used before; ask for a new one")

    town.coordinator.die()
    town.coordinator.open(admit=admit)
    kitchen = town.add("kitchen").open()
    del town.keys["kitchen"]

    stream = kitchen.courier.send("coordinator", enrol(kitchen), task="token-1")
    town.settle()

    with pytest.raises(EnrolmentError, match="used before; ask for a new one"):
        kitchen.courier.wait_until_done(stream, 1.0)
    assert town.coordinator.mailbox.unread() == []


@pytest.mark.parametrize("changes", [{"device": "garage"}, {"identity_key": b"x" * 32}])
def test_an_enrol_for_another_device_or_other_keys_never_reaches_the_hook(
    town: Town, changes: dict
) -> None:
    asked: list[str] = []
    town.coordinator.die()
    town.coordinator.open(admit=lambda message, _: asked.append(message.device))
    kitchen = town.add("kitchen").open()
    del town.keys["kitchen"]

    kitchen.courier.send("coordinator", enrol(kitchen, **changes), task="token-1")
    town.settle()

    assert asked == []
    assert len(kitchen.mailbox.parked()) == 1


def test_the_key_bundle_is_retained_and_announced_again_after_a_reconnect(town: Town) -> None:
    bundles: list[bytes] = []
    town.coordinator.courier.announce_keys(b"bundle")
    town.turn()

    kitchen = town.add("kitchen").open(keys=bundles.append)
    town.turn()
    town.coordinator.link.cut()
    town.coordinator.link.connect()
    town.turn()
    town.turn()

    assert bundles == [b"bundle", b"bundle"]
    assert kitchen.courier.malformed["coordinator"] == 0


# --- what the application sees ------------------------------------------------------------------


def test_progress_and_counters(town: Town) -> None:
    steps: list[Progress] = []
    kitchen = town.add("kitchen").open(progress=steps.append)

    kitchen.courier.send("coordinator", file("t", 1_000_000), task="t")
    town.settle()

    fractions = [step.done_bytes / step.total_bytes for step in steps]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(step.kind == "File" and step.outgoing for step in steps)
    assert 1_000_000 < kitchen.courier.bytes_up["File"] < 1_010_000
    assert kitchen.courier.bytes_up == town.coordinator.courier.bytes_up
    assert kitchen.courier.bytes_down == town.coordinator.courier.bytes_down
    assert 0 < kitchen.courier.bytes_down["File"] < 2_000


def test_a_message_to_a_peer_without_keys_waits_until_they_are_known(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    keys = town.keys.pop("coordinator")
    kitchen.courier.send("coordinator", refused("t"), task="t")
    for _ in range(100):
        town.turn()
        town.time_s += 0.25
    assert town.coordinator.letters() == []

    town.keys["coordinator"] = keys
    town.settle()

    assert town.coordinator.letters() == [refused("t")]


def test_waiting_for_an_unconfirmed_message_ends_in_a_link_error(town: Town) -> None:
    kitchen = town.add("kitchen").open()
    kitchen.link.cut()
    stream = kitchen.courier.send("coordinator", refused("t"), task="t")

    with pytest.raises(LinkError, match="stays in the outbox"):
        kitchen.courier.wait_until_done(stream, 0.01)


def test_nobody_writes_to_himself(town: Town) -> None:
    with pytest.raises(LocalProtocolError):
        town.coordinator.courier.send("coordinator", refused("t"), task="t")


def test_parts_of_a_task_have_names_of_their_own() -> None:
    assert part("task", "a") == part("task", "a") != part("task", "b")
    assert len(part("t" * 128, "a")) == 128
