"""The enrolment code and the key bundle: what may be believed, and what not."""

import contextlib
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import EnrolmentError, FleetError, RemoteProtocolError
from edge_sdk.wire.enrolment import (
    MAX_BUNDLE_BYTES,
    MAX_CODE_CHARS,
    EnrolmentCode,
    KeyBundle,
    check_secret,
    root_key_hash,
    secret_hash,
    sign_bundle,
)
from edge_sdk.wire.seal import Identity, PublicIdentity

ROOT = Identity.from_bytes(bytes(range(64)))
KEYS = Identity.from_bytes(bytes(range(64, 128))).public
CODE = EnrolmentCode("t-1", bytes(range(16)), "acme", "kitchen-1", root_key_hash(ROOT.public), 2000)


def verified(data: bytes, root_hash=None, now_s: float = 1000.0, **changed) -> KeyBundle:
    root_hash = root_hash or root_key_hash(ROOT.public)
    return KeyBundle.verify(data, root_hash, now_s, **({"tenant": "acme"} | changed))


def bundle(**changed) -> bytes:
    return sign_bundle(
        ROOT, KEYS, **({"tenant": "acme", "version": 3, "expires_s": 2000} | changed)
    )


def test_a_code_survives_its_text_and_a_line_break_in_it():
    text = CODE.to_text()

    assert EnrolmentCode.from_text(text) == CODE
    assert EnrolmentCode.from_text(f"  {text[:40]}\n {text[40:]}\n") == CODE
    assert len(text) < 200


def test_every_mistyped_character_is_noticed():
    text = CODE.to_text()
    rng = random.Random(0)

    for at in range(len("symbiont1:"), len(text)):
        other = rng.choice([c for c in "abcdeXYZ0189-_" if c != text[at]])
        with contextlib.suppress(EnrolmentError):  # the last character has spare bits
            assert EnrolmentCode.from_text(text[:at] + other + text[at + 1 :]) == CODE


def test_a_code_does_not_show_its_secret():
    assert CODE.secret.hex() not in repr(CODE)
    assert repr(CODE.secret) not in f"{CODE}"


def test_an_expired_code_is_refused():
    CODE.check_fresh(1999)
    with pytest.raises(EnrolmentError, match="expired"):
        CODE.check_fresh(2000)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(max_size=200), st.text(max_size=99).map(lambda t: "symbiont1:" + t)))
def test_any_text_gives_a_code_or_an_enrolment_error(text):
    with contextlib.suppress(EnrolmentError):
        EnrolmentCode.from_text(text)


def test_an_endless_code_is_refused():
    with pytest.raises(EnrolmentError):
        EnrolmentCode.from_text("symbiont1:" + "A" * MAX_CODE_CHARS)


def test_only_the_right_secret_passes():
    stored = secret_hash("t-1", CODE.secret)

    check_secret(stored, "t-1", CODE.secret)
    for token, secret in (("t-1", bytes(16)), ("t-2", CODE.secret), ("t-1", b"")):
        with pytest.raises(EnrolmentError):
            check_secret(stored, token, secret)
    assert CODE.secret not in stored


def test_a_good_bundle_gives_the_coordinators_keys():
    believed = verified(bundle(), newer_than=3)

    assert believed.identity == KEYS
    assert believed.version == 3


@pytest.mark.parametrize(
    ("data", "expected", "match"),
    [
        (bundle(), {"root_hash": bytes(32)}, "another root"),
        (bundle(tenant="other"), {}, "tenant"),
        (bundle(), {"newer_than": 4}, "older than 4"),
        (bundle(), {"now_s": 2000.0}, "expired"),
    ],
)
def test_a_foreign_older_or_expired_bundle_is_refused(data, expected, match):
    with pytest.raises(EnrolmentError, match=match):
        verified(data, **expected)


def test_every_changed_bundle_byte_is_refused():
    good = bundle()
    for at in range(len(good)):
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(good)
            changed[at] ^= mask
            with pytest.raises(FleetError):
                verified(bytes(changed))


def test_a_bundle_whose_keys_nobody_can_use_is_refused():
    useless = PublicIdentity(KEYS.sign, bytes(32))
    with pytest.raises(RemoteProtocolError):
        verified(sign_bundle(ROOT, useless, tenant="acme", version=1, expires_s=2000))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.binary(max_size=300))
def test_any_bytes_give_a_bundle_or_a_fleet_error(data):
    for attempt in (data, msgspec.msgpack.encode([data, data])):
        with pytest.raises(FleetError):
            verified(attempt)


def test_an_endless_bundle_is_refused():
    with pytest.raises(RemoteProtocolError, match="limit"):
        verified(bytes(MAX_BUNDLE_BYTES + 1))
