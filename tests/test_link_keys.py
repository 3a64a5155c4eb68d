"""A device believes only the keys that its enrolment code vouches for, and never older ones."""

import random
import threading
import time
from pathlib import Path

import pytest

from edge_sdk.errors import EnrolmentError, LinkError, RemoteProtocolError
from edge_sdk.link.courier import Courier
from edge_sdk.link.keys import CoordinatorKeys
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.enrolment import root_key_hash, sign_bundle
from edge_sdk.wire.messages import Enrol
from edge_sdk.wire.seal import Identity, PublicIdentity

NOW_S = 1_800_000_000.0
ROOT, OTHER_ROOT, COORDINATOR, NEXT = (Identity.generate() for _ in range(4))
HASH = root_key_hash(ROOT.public)


def bundle(
    root: Identity = ROOT, keys: Identity = COORDINATOR, version: int = 2, **changes
) -> bytes:
    fields = {"tenant": "home", "version": version, "expires_s": int(NOW_S) + 60, **changes}
    return sign_bundle(root, keys.public, **fields)


def device_keys(**options) -> CoordinatorKeys:
    return CoordinatorKeys("home", HASH, now=lambda: NOW_S, **options)


def test_good_keys_are_known_from_then_on_and_written_down_once() -> None:
    kept: list[bytes] = []
    keys = device_keys(keep=kept.append)
    assert keys.lookup("coordinator") is None

    keys.receive(bundle())
    keys.receive(bundle())

    assert keys.wait(0.0) == keys.lookup("coordinator") == COORDINATOR.public
    assert keys.lookup("kitchen") is None
    assert kept == [bundle()]


@pytest.mark.parametrize(
    "bad",
    [
        bundle(root=OTHER_ROOT),
        bundle(tenant="office"),
        bundle(expires_s=int(NOW_S)),
        b"not a bundle",
        b"",
    ],
    ids=["root", "tenant", "expired", "noise", "empty"],
)
def test_keys_that_nobody_vouches_for_are_refused(bad: bytes) -> None:
    keys = device_keys()

    with pytest.raises((EnrolmentError, RemoteProtocolError)):
        keys.receive(bad)

    assert keys.lookup("coordinator") is None
    with pytest.raises(EnrolmentError):
        keys.wait(0.0)


def test_an_older_bundle_does_not_replace_a_newer_one() -> None:
    keys = device_keys(bundle=bundle(keys=NEXT, version=3))

    with pytest.raises(EnrolmentError, match="older"):
        keys.receive(bundle(version=2))

    assert keys.lookup("coordinator") == NEXT.public


def test_a_kept_bundle_that_expired_is_forgotten() -> None:
    assert device_keys(bundle=bundle(expires_s=1)).lookup("coordinator") is None


def test_waiting_without_a_coordinator_ends_in_a_link_error() -> None:
    with pytest.raises(LinkError, match="tenant home"):
        device_keys().wait(0.01)


def test_a_device_that_knows_only_its_code_enrols(tmp_path: Path) -> None:
    """The whole way with threads: bundle fetched and verified, Enrol sent, taken in, confirmed."""
    broker = MemoryBroker()
    fleet: dict[str, PublicIdentity] = {}
    entered = threading.Event()

    def admit(message: Enrol, public: PublicIdentity) -> None:
        if message.secret != b"s" * 16:
            raise EnrolmentError("the enrolment code is wrong; ask for a new one")
        fleet[message.device] = public
        entered.set()

    def courier(name: str, identity: Identity, **options) -> Courier:
        return Courier(
            broker.link(name),
            Mailbox(tmp_path / f"{name}.db"),
            identity,
            tenant="home",
            me=name,
            now=lambda: NOW_S,
            rng=random.Random(1),
            patience_s=0.1,
            **options,
        )

    keys = device_keys()
    me = Identity.generate()
    good = Enrol("t1", b"s" * 16, "kitchen", me.public.sign, me.public.receive, ("slm",), 100)
    bad = Enrol("t2", b"x" * 16, "kitchen", me.public.sign, me.public.receive, ("slm",), 100)
    with (
        courier("coordinator", COORDINATOR, lookup=fleet.get, admit=admit) as coordinator,
        courier("kitchen", me, lookup=keys.lookup, keys=keys.receive) as kitchen,
    ):
        coordinator.announce_keys(bundle())
        keys.wait(10.0)

        with pytest.raises(EnrolmentError, match="code is wrong"):
            kitchen.enrol(bad, timeout_s=10.0)
        kitchen.enrol(good, timeout_s=10.0)

        assert entered.is_set()
        assert fleet == {"kitchen": me.public}
        began = time.monotonic()
        assert coordinator.wait_for_mail(10.0)
        assert time.monotonic() - began < 1.0
    for each in (coordinator, kitchen):
        each.mailbox.close()
