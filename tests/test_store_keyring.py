"""Keys over time: what opens when, what is deleted, and what a power cut leaves."""

from pathlib import Path

import pytest

from edge_sdk.errors import ConfigError, StorageError
from edge_sdk.store import keyring
from edge_sdk.store.clock import KEEP_EVERY_S, LAST_S, SignedTime
from edge_sdk.store.keyring import Keyring, OneKey
from edge_sdk.store.keys import save
from edge_sdk.wire.seal import Identity, PublicIdentity


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "identity.key"


def opens(ring: Keyring | OneKey, public: PublicIdentity) -> bool:
    return ring.opener(public.receive_id, public.suite) is not None


def files_hold(folder: Path, identity: Identity) -> bool:
    import base64

    secret = identity.receiving.private_bytes_raw()
    data = [path.read_bytes() for path in folder.iterdir()]
    plain = [base64.b64decode(d.split(b"\n", 1)[1]) for d in data if d.startswith(b"symbiont-")]
    return any(secret in each for each in [*data, *plain])


def test_prepared_keys_open_before_they_are_used_and_old_ones_until_their_grace_ends(
    path: Path,
) -> None:
    ring = Keyring(path)
    old = ring.identity

    coming = ring.prepare()

    assert ring.identity.to_bytes() == old.to_bytes()
    assert opens(ring, coming.public)
    ring.confirm(100.0, grace_s=50.0)
    assert ring.public == coming.public
    assert ring.public.sign == old.public.sign
    assert opens(ring, old.public)
    assert ring.tidy(149.0) == 0
    assert ring.tidy(150.0) == 1
    assert not opens(ring, old.public)
    assert not files_hold(path.parent, old)


def test_everything_is_there_after_a_restart(path: Path) -> None:
    ring = Keyring(path)
    old = ring.identity
    ring.prepare(signing=True)
    ring.confirm(100.0, grace_s=50.0)
    coming = ring.prepare()

    again = Keyring(path)

    assert again.public == ring.public
    assert again.public.sign != old.public.sign
    assert again.made_s == 100.0
    assert again.coming is not None
    assert again.coming.public == coming.public
    assert opens(again, old.public)
    assert again.prepare().public == coming.public


def test_a_cut_before_the_keys_are_in_their_file_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = Keyring(path)
    old = ring.public
    coming = ring.prepare()

    def cut(*_: object) -> None:
        raise StorageError("the power went")

    monkeypatch.setattr(keyring, "save", cut)
    with pytest.raises(StorageError):
        ring.confirm(100.0, grace_s=50.0)
    monkeypatch.setattr(keyring, "save", save)

    again = Keyring(path)
    assert again.public == old
    assert opens(again, old)
    assert opens(again, coming.public)  # others were told of these: they must still open
    again.confirm(200.0, grace_s=50.0)
    assert again.public == coming.public
    assert again.tidy(1e9) == 1


def test_a_cut_after_the_keys_are_in_their_file_finishes_the_change(path: Path) -> None:
    ring = Keyring(path)
    coming = ring.prepare()
    save(path, coming)  # and no further

    again = Keyring(path)

    assert again.public == coming.public
    assert again.coming is None


def test_a_ring_that_others_may_read_is_refused(path: Path) -> None:
    Keyring(path).prepare()
    path.with_name("identity.key.ring").chmod(0o644)

    with pytest.raises(ConfigError, match="0644"):
        Keyring(path)


def test_a_grace_can_be_cut_short(path: Path) -> None:
    ring = Keyring(path)
    old = ring.public
    ring.prepare()
    ring.confirm(100.0, grace_s=86_400.0)

    ring.shorten(200.0)
    ring.tidy(200.0)

    assert not opens(ring, old)


def test_one_key_opens_only_itself() -> None:
    identity = Identity.generate()

    assert opens(OneKey(identity), identity.public)
    assert not opens(OneKey(identity), Identity.generate().public)


class Clock:
    t = 0.0

    def __call__(self) -> float:
        return self.t


def test_signed_time_only_moves_forwards() -> None:
    clock = Clock()
    kept: list[float] = []
    signed = SignedTime(floor_s=1_000.0, keep=kept.append, clock=clock)

    assert signed() == 1_000.0
    signed.heard(500.0)
    assert signed() == 1_000.0
    signed.heard(9_000.0)
    clock.t += 5.0
    signed.heard(9_001.0)
    assert signed() == 9_005.0
    clock.t -= 100.0  # a clock that is not monotonic after all
    assert signed() >= 9_000.0
    assert kept == [9_000.0]


def test_signed_time_is_kept_now_and_then() -> None:
    clock, kept = Clock(), list[float]()
    signed = SignedTime(floor_s=1_000.0, keep=kept.append, clock=clock)

    clock.t = KEEP_EVERY_S - 1
    signed.keep()
    clock.t = KEEP_EVERY_S
    signed.keep()

    assert kept == [1_000.0 + KEEP_EVERY_S]


@pytest.mark.parametrize("absurd", [-1.0, LAST_S * 2, 2.0**63])
def test_a_time_beyond_any_calendar_is_refused(absurd: float) -> None:
    from edge_sdk.errors import RemoteProtocolError

    with pytest.raises(RemoteProtocolError, match="not a time"):
        SignedTime().heard(absurd)
