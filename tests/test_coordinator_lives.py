"""Devices and keys over time on the coordinator: approval, renewal, revocation, the epoch key."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.desk import Desk
from coordinator.fleet import DeviceState
from coordinator.warden import (
    BUNDLE_RENEW_S,
    EPOCH_S,
    LONGEST_GRACE_S,
    SHORTEST_GRACE_S,
    want_rotation,
)
from edge_sdk.cli import main
from edge_sdk.errors import EnrolmentError, LinkError, RemoteProtocolError
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.wire.enrolment import KeyBundle, root_key_hash, state_keys
from edge_sdk.wire.messages import RenewKeys
from edge_sdk.wire.seal import Identity
from tests.torture.keys_world import SETTINGS, Device, Tenant, settings, until

NAME = "kitchen"


class Clock:
    """The coordinator's clock; starts at the true time, so that codes are made as always."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tenant(tmp_path: Path, broker: MemoryBroker, clock: Clock) -> Iterator[Tenant]:
    made = Tenant(tmp_path / "cloud", broker.link("cloud"), now=clock).start()
    yield made
    made.close()


@pytest.fixture
def device(tenant: Tenant, tmp_path: Path, broker: MemoryBroker) -> Iterator[Device]:
    made = Device(tmp_path / NAME, broker.link(NAME)).enrol(tenant.code(NAME))
    yield made
    made.close()


def open_ask(desk: Desk) -> None:
    with desk.store.transaction():
        desk.store.ask("run", NAME, kind="K", digest=b"", expected="{}", step=0, state="open")


# --- approval ---------------------------------------------------------------------------------


def test_a_device_waits_until_it_is_approved(tmp_path: Path, broker: MemoryBroker) -> None:
    tenant = Tenant(tmp_path / "cloud", broker.link("cloud"), enrolment="approve").start()
    tenant.desk.registry().prepare()
    device = Device(tmp_path / NAME, broker.link(NAME))
    device.ask(tenant.code(NAME))

    assert tenant.desk.fleet.get(NAME).state == DeviceState.PENDING
    assert tenant.desk.fleet.active() == ()
    assert tenant.desk.fleet.lookup(NAME) is None
    with pytest.raises(LinkError):
        until(lambda: device.member.complete, "an answer too early", 0.5)

    with Desk(settings(tmp_path / "cloud", "home", "approve")) as command:  # as the command does
        command.approve(NAME)
    tenant.warden.tick()

    until(lambda: device.member.complete, "the answer")
    assert tenant.desk.fleet.active() == (NAME,)
    with pytest.raises(EnrolmentError, match="active; only pending"):
        tenant.desk.approve(NAME)
    device.close()
    tenant.close()


def test_the_commands_list_approve_and_revoke(
    tmp_path: Path, broker: MemoryBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "coordinator.toml"
    text = SETTINGS.format(tenant="home", folder=tmp_path / "c", enrolment="approve", more="")
    file.write_text(text)
    with Desk(settings(tmp_path / "c", "home", "approve")) as desk:
        desk.registry().prepare()
        keys, code = Identity.generate(), desk.token(NAME, lasts_s=60)
        public = keys.public
        from edge_sdk.wire.messages import Enrol

        words = Enrol(code.token_id, code.secret, NAME, public.sign, public.receive, (), 0)
        desk.fleet.admit(words, public)

    def run(*words: str) -> tuple[int, dict[str, object]]:
        status = main([*words, "--config", str(file), "--json"])
        return status, json.loads(capsys.readouterr().out)

    assert run("device", "list")[1]["devices"][0]["state"] == "pending"
    assert run("device", "approve", NAME) == (0, {"device": NAME, "state": "active"})
    assert run("device", "approve", "nobody")[0] == 1
    status, told = run("device", "revoke", NAME)
    assert (status, told["state"]) == (0, "revoked")
    assert "broker_dir" in str(told["session"])
    status, told = run("device", "approve", NAME)
    assert status == 1
    assert "new code" in str(told["message"])
    assert run("coordinator", "keys", "--rotate")[1]["rotation_wanted"] is True


# --- renewal ----------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", [False, True])
def test_a_device_changes_its_keys(tenant: Tenant, device: Device, identity: bool) -> None:
    before = tenant.desk.fleet.lookup(NAME)

    device.member.renew(device.courier, identity=identity)
    until(lambda: device.member.ring.coming is None, "the answer")

    after = tenant.desk.fleet.lookup(NAME)
    assert after == device.member.ring.public
    assert after.receive != before.receive
    assert (after.sign != before.sign) == identity
    device.courier.wait_until_done(device.say("later", 100_000), 20.0)


def test_receive_keys_change_after_a_week_of_signed_time(
    tenant: Tenant, tmp_path: Path, broker: MemoryBroker
) -> None:
    passed = [0.0]
    name = "clockless"
    device = Device(tmp_path / name, broker.link(name), clock=lambda: time.monotonic() + passed[0])
    device.enrol(tenant.code(name))
    until(lambda: device.member.ring.made_s > 0, "the first upkeep")
    first = device.member.ring.public

    passed[0] = 7 * 86_400 + 60
    until(lambda: device.member.ring.public != first, "new keys")

    assert tenant.desk.fleet.lookup(name) == device.member.ring.public
    device.close()


def test_nobody_changes_the_keys_of_another(tenant: Tenant, device: Device) -> None:
    mine, thief, fresh = device.member.ring.identity, Identity.generate(), Identity.generate()
    fleet = tenant.desk.fleet
    good = state_keys("home", NAME, mine, fresh)
    bad = [
        state_keys("office", NAME, mine, fresh),
        state_keys("home", "garage", mine, fresh),
        state_keys("home", NAME, thief, fresh),
        (good[0], good[1], bytes(64)),  # not signed by the new key
        (good[0], bytes(64), good[2]),  # not signed by the old one
        (good[0], good[2], good[1]),
        (b"noise", *good[1:]),
    ]

    for words in bad:
        with pytest.raises(RemoteProtocolError):
            fleet.renew(NAME, RenewKeys("renew-1", *words))

    assert fleet.lookup(NAME) == mine.public


# --- revocation -------------------------------------------------------------------------------


def test_revoking_stops_what_is_on_its_way(tenant: Tenant, device: Device) -> None:
    device.link.cut()
    from edge_sdk.wire.messages import Score

    stream = tenant.send(NAME, Score("late", "base", ("a",), ("open",)), "late")

    tenant.desk.revoke(NAME)
    tenant.warden.tick()
    device.link.connect()
    time.sleep(0.5)

    assert tenant.desk.mailbox.posted(stream) is None
    assert not [m for m in device.read if isinstance(m, Score)]
    assert {"event": "revoked", "device": NAME} in tenant.events


# --- the epoch key ----------------------------------------------------------------------------


def test_the_epoch_key_is_replaced_every_day(tenant: Tenant, clock: Clock) -> None:
    tenant.warden.tick()
    first = tenant.desk.identity.public

    clock.ahead = EPOCH_S - 10
    tenant.warden.tick()
    assert tenant.desk.identity.public == first
    clock.ahead = EPOCH_S + 10
    tenant.warden.tick()

    second = tenant.desk.identity.public
    assert second.receive != first.receive
    assert second.sign == first.sign


def test_an_old_epoch_key_lasts_as_long_as_its_rounds_and_a_day_at_most(
    tenant: Tenant, clock: Clock
) -> None:
    open_ask(tenant.desk)
    tenant.warden.tick()
    tenant.warden.rotate()

    clock.ahead = SHORTEST_GRACE_S + 10
    tenant.warden.tick()
    assert tenant.desk.ring.retired == 1  # a round is still open
    clock.ahead = LONGEST_GRACE_S + 10
    tenant.warden.tick()
    assert tenant.desk.ring.retired <= 1  # the day's own rotation, not the one before
    with tenant.desk.store.transaction() as db:
        db.execute("UPDATE asks SET state = 'closed'")
    clock.ahead += SHORTEST_GRACE_S + 10
    tenant.warden.tick()
    assert tenant.desk.ring.retired == 0


def test_a_command_in_another_process_asks_for_a_rotation(
    tenant: Tenant, device: Device, tmp_path: Path
) -> None:
    tenant.warden.tick()
    before = tenant.desk.identity.public
    with Desk(settings(tmp_path / "cloud", "home")) as command:
        want_rotation(command)

    tenant.warden.tick()
    tenant.warden.tick()

    assert tenant.desk.identity.public.receive != before.receive
    assert len([e for e in tenant.events if e["event"] == "rotated"]) == 1
    until(
        lambda: device.member.keys.lookup("coordinator") == tenant.desk.identity.public, "the keys"
    )


def test_bundles_grow_by_version_even_when_the_clock_is_set_back(
    tenant: Tenant, clock: Clock
) -> None:
    root = root_key_hash(tenant.desk.root.public)

    def bundle() -> KeyBundle:
        return KeyBundle.verify(tenant.desk.bundle(lasts_s=3600), root, 0.0, tenant="home")

    first = bundle()
    clock.ahead = -10 * 365 * 86_400
    second = bundle()

    assert second.version == first.version + 1
    assert abs(second.issued_s - first.issued_s + 10 * 365 * 86_400) < 5


def test_the_bundle_is_signed_anew_every_day(tenant: Tenant, clock: Clock) -> None:
    tenant.warden.tick()
    version = tenant.desk.recall("bundle_version")

    clock.ahead = BUNDLE_RENEW_S + 10
    tenant.warden.tick()

    assert tenant.desk.recall("bundle_version") > version
