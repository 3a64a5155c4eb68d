"""Who may enrol, how often, and what becomes of devices that misbehave."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.fleet import FAULTS_BEFORE_QUARANTINE, DeviceState, Fleet
from coordinator.store import Store
from edge_sdk.errors import ConfigError, EnrolmentError
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.enrolment import EnrolmentCode
from edge_sdk.wire.messages import Enrol
from edge_sdk.wire.seal import Identity

ROOT = bytes(32)


class Clock:
    t = 1_000_000.0

    def __call__(self) -> float:
        return self.t


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with Mailbox(tmp_path / "c.db") as mailbox:
        yield Store(mailbox, clock)


@pytest.fixture
def fleet(store: Store, clock: Clock) -> Fleet:
    return Fleet(store, tenant="home", now=clock)


def enrol(code: EnrolmentCode, keys: Identity, **changes: object) -> Enrol:
    public = keys.public
    fields = {
        "token_id": code.token_id,
        "secret": code.secret,
        "device": code.device,
        "identity_key": public.sign,
        "receive_key": public.receive,
        "families": ("slm",),
        "memory_mb": 256,
    }
    return Enrol(**{**fields, **changes})


def test_a_good_code_admits_its_device(fleet: Fleet) -> None:
    keys = Identity.generate()
    code = fleet.token("kitchen-1", root_key_hash=ROOT)

    fleet.admit(enrol(code, keys), keys.public)

    assert fleet.lookup("kitchen-1") == keys.public
    assert fleet.active("slm") == ("kitchen-1",)
    assert fleet.active("other") == ()


def test_only_a_hash_of_the_secret_is_stored(fleet: Fleet, store: Store, tmp_path: Path) -> None:
    code = fleet.token("kitchen-1", root_key_hash=ROOT)

    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())

    assert code.token_id.encode() in written
    assert code.secret not in written


def test_of_fifty_threads_with_one_code_exactly_one_wins(fleet: Fleet, store: Store) -> None:
    code = fleet.token("kitchen-1", root_key_hash=ROOT)
    contenders = [Identity.generate() for _ in range(50)]
    barrier, won, lost = threading.Barrier(50), [], []

    def contend(keys: Identity) -> None:
        barrier.wait()
        try:
            fleet.admit(enrol(code, keys), keys.public)
            won.append(keys)
        except EnrolmentError as exc:
            lost.append(str(exc))

    threads = [threading.Thread(target=contend, args=(keys,)) for keys in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1
    assert len(lost) == 49
    assert all("already used" in reason for reason in lost)
    assert fleet.lookup("kitchen-1") == won[0].public
    with store.transaction() as db:
        assert db.execute("SELECT COUNT(*) FROM devices").fetchone() == (1,)


@pytest.mark.parametrize(
    ("changes", "wait_s", "reason"),
    [
        ({"token_id": "t-unknown"}, 0, "not known"),
        ({"secret": bytes(16)}, 0, "not known"),
        ({"device": "garage-1"}, 0, "is for kitchen-1, not for garage-1"),
        ({}, 3601, "expired"),
    ],
)
def test_a_bad_enrolment_says_why(
    fleet: Fleet, clock: Clock, changes: dict[str, object], wait_s: float, reason: str
) -> None:
    keys = Identity.generate()
    code = fleet.token("kitchen-1", root_key_hash=ROOT)
    clock.t += wait_s

    with pytest.raises(EnrolmentError, match=reason):
        fleet.admit(enrol(code, keys, **changes), keys.public)

    assert fleet.list() == ()


def test_a_used_code_is_refused_to_another_and_repeated_to_its_owner(fleet: Fleet) -> None:
    keys, thief = Identity.generate(), Identity.generate()
    code = fleet.token("kitchen-1", root_key_hash=ROOT)
    fleet.admit(enrol(code, keys), keys.public)

    fleet.admit(enrol(code, keys), keys.public)
    with pytest.raises(EnrolmentError, match="already used"):
        fleet.admit(enrol(code, thief), thief.public)

    assert fleet.lookup("kitchen-1") == keys.public


def test_keys_must_be_those_the_message_came_with(fleet: Fleet) -> None:
    keys, other = Identity.generate(), Identity.generate()
    code = fleet.token("kitchen-1", root_key_hash=ROOT)

    with pytest.raises(EnrolmentError, match="other keys"):
        fleet.admit(enrol(code, keys), other.public)


def test_a_revoked_device_is_unknown_until_it_gets_a_new_code(fleet: Fleet) -> None:
    keys = Identity.generate()
    code = fleet.token("kitchen-1", root_key_hash=ROOT)
    spare = fleet.token("kitchen-1", root_key_hash=ROOT)
    fleet.admit(enrol(code, keys), keys.public)

    fleet.revoke("kitchen-1")

    assert fleet.lookup("kitchen-1") is None
    with pytest.raises(EnrolmentError, match="already used"):  # open codes went with it
        fleet.admit(enrol(spare, keys), keys.public)
    fresh = fleet.token("kitchen-1", root_key_hash=ROOT)
    fleet.admit(enrol(fresh, keys), keys.public)
    assert fleet.active() == ("kitchen-1",)


def test_revoking_an_unknown_device_names_the_known_ones(fleet: Fleet) -> None:
    keys = Identity.generate()
    fleet.admit(enrol(fleet.token("a", root_key_hash=ROOT), keys), keys.public)

    with pytest.raises(EnrolmentError, match="no device b here; enrolled are: a"):
        fleet.revoke("b")


def test_repeated_faults_lead_to_quarantine(fleet: Fleet) -> None:
    keys = Identity.generate()
    fleet.admit(enrol(fleet.token("a", root_key_hash=ROOT), keys), keys.public)

    told = [fleet.fault("a") for _ in range(FAULTS_BEFORE_QUARANTINE + 1)]

    assert told.count(True) == 1
    assert fleet.get("a").state == DeviceState.QUARANTINED
    assert fleet.active() == ()
    assert fleet.lookup("a") == keys.public


def test_tenants_do_not_see_each_other(store: Store, clock: Clock) -> None:
    home, office = (Fleet(store, tenant=name, now=clock) for name in ("home", "office"))
    keys = Identity.generate()
    code = home.token("a", root_key_hash=ROOT)

    with pytest.raises(EnrolmentError, match="not known"):
        office.admit(enrol(code, keys), keys.public)
    home.admit(enrol(code, keys), keys.public)

    assert office.list() == ()
    assert office.lookup("a") is None


@pytest.mark.parametrize("name", ["coordinator", "a b", "", "../x", "x" * 129])
def test_bad_device_names_are_refused(fleet: Fleet, name: str) -> None:
    with pytest.raises(ConfigError):
        fleet.token(name, root_key_hash=ROOT)


def test_a_code_lasts_at_most_a_day(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="86400"):
        fleet.token("a", root_key_hash=ROOT, lasts_s=90_000)
