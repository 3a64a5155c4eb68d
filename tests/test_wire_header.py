"""The header and the identities: one encoding, fixed limits, and errors of one kind."""

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import FleetError, LocalProtocolError, RemoteProtocolError, SealError
from edge_sdk.wire.header import CHUNK_BYTES, Header, count_chunks
from edge_sdk.wire.identity import (
    HYBRID_PUBLIC_BYTES,
    SUITE_HYBRID,
    SUITE_X25519,
    Identity,
    PublicIdentity,
)
from edge_sdk.wire.seal import peek_header

SENDER = Identity.from_bytes(bytes(range(64)))
HYBRID = Identity.from_bytes(bytes(range(160)))


def header(**changed) -> Header:
    fields = {
        "version": 1,
        "suite": 1,
        "tenant": "acme",
        "sender": "kitchen-1",
        "sender_key": bytes(8),
        "recipient": "coordinator",
        "recipient_key": bytes(8),
        "kind": "AdapterUpdate",
        "task": "round-1",
        "stream": bytes(16),
        "sequence": 7,
        "created_s": 1_000,
        "expires_s": 2_000,
        "plaintext_bytes": 1,
        "chunk_bytes": CHUNK_BYTES,
        "chunks": 1,
    }
    return Header(**(fields | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"task": ""},
        {"task": "a/b"},
        {"tenant": "t" * 129},
        {"kind": "Ä"},
        {"task": "x\n"},
        {"sequence": -1},
        {"expires_s": 2**63},
        {"stream": b"short"},
    ],
)
def test_a_header_that_peers_would_refuse_is_not_made(changed):
    with pytest.raises(LocalProtocolError):
        header(**changed).encode()


name = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
number = st.integers(0, 2**63 - 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    names=st.tuples(name, name, name, name, name),
    ids=st.tuples(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8)),
    stream=st.binary(min_size=16, max_size=16),
    numbers=st.tuples(number, number, number),
    size=st.integers(0, 512 * 1024 * 1024),
)
def test_any_header_survives_its_bytes(names, ids, stream, numbers, size):
    tenant, sender, recipient, kind, task = names
    before = Header(
        1, 1, tenant, sender, ids[0], recipient, ids[1], kind, task, stream, *numbers, size,
        CHUNK_BYTES, count_chunks(size),
    )  # fmt: skip

    assert Header.decode(before.encode()) == before


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.binary(max_size=600))
def test_any_bytes_give_a_header_or_a_fleet_error(data):
    for parse in (Header.decode, peek_header, PublicIdentity.from_bytes):
        with contextlib.suppress(FleetError):
            parse(data)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(at=st.integers(0, 200), value=st.integers(0, 255))
def test_a_header_has_one_encoding_only(at, value):
    """The wrap is bound to the header encoded anew: it must be the bytes that were signed."""
    data = bytearray(header().encode())
    data[at % len(data)] = value

    with contextlib.suppress(RemoteProtocolError):
        assert Header.decode(bytes(data)).encode() == bytes(data)


def test_a_header_that_claims_too_much_is_refused_before_anything_is_allocated():
    honest = header().encode()
    numbers = struct.Struct(">QQII")  # expires, plaintext, chunk size, chunks
    for plaintext, chunk, chunks in [
        (2**62, CHUNK_BYTES, 2**31),
        (1, CHUNK_BYTES, 2**32 - 1),
        (1, 1, 1),
        (0, CHUNK_BYTES, 0),
    ]:
        lying = honest[: -numbers.size] + numbers.pack(2_000, plaintext, chunk, chunks)
        with pytest.raises(RemoteProtocolError):
            Header.decode(lying)


def test_receive_keys_of_small_order_are_refused():
    for point in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(RemoteProtocolError):
            PublicIdentity.from_bytes(SENDER.public.sign + point)


def test_identities_survive_their_bytes_and_hide_their_secrets():
    assert Identity.from_bytes(SENDER.to_bytes()).public == SENDER.public
    assert SENDER.to_bytes()[:32].hex() not in repr(SENDER)
    with pytest.raises(LocalProtocolError):
        Identity.from_bytes(b"short")


def test_expiry_is_judged_by_the_time_given():
    assert not header().expired(1_999)
    assert header().expired(2_000)


@pytest.mark.parametrize(("version", "suite"), [(1, 0), (1, 3), (2, 1), (0, 1)])
def test_unknown_versions_and_suites_are_refused(version, suite):
    with pytest.raises(LocalProtocolError, match="update this side"):
        header(version=version, suite=suite).encode()


def test_a_header_over_the_limit_is_refused_unread():
    with pytest.raises(RemoteProtocolError, match="1024"):
        Header.decode(bytes(1025))


@pytest.mark.parametrize("data", [b"", b"\0", bytes(40_000_000)], ids=["none", "one", "huge"])
def test_what_cannot_be_a_manifest_has_no_header(data):
    with pytest.raises(RemoteProtocolError):
        peek_header(data)


@pytest.mark.parametrize("identity", [SENDER, HYBRID], ids=["plain", "hybrid"])
def test_public_identities_survive_their_bytes(identity):
    public = identity.public

    assert PublicIdentity.from_bytes(public.to_bytes()) == public
    assert Identity.from_bytes(identity.to_bytes()).public == public


def test_the_hybrid_key_is_an_addition_and_no_replacement():
    assert HYBRID.public.suite == SUITE_HYBRID
    assert SENDER.public.suite == SUITE_X25519
    assert len(HYBRID.public.hybrid) == HYBRID_PUBLIC_BYTES
    assert SENDER.public.sign_id == HYBRID.public.sign_id
    assert HYBRID.public.key_id(SUITE_X25519) == SENDER.public.receive_id
    assert HYBRID.public.receive_id == HYBRID.public.key_id(SUITE_HYBRID)
    assert HYBRID.public.receive_id != SENDER.public.receive_id
    assert Identity.generate().with_hybrid().public.hybrid


def test_hybrid_keys_nobody_can_encrypt_to_are_refused():
    good = HYBRID.public.to_bytes()
    for bad in (
        good[:-32] + bytes(32),  # small order beside a good lattice key
        good[:64] + b"\xff" * 1184 + good[-32:],  # coefficients above the modulus
        good[:-1],
        good + b"\0",
    ):
        with pytest.raises(RemoteProtocolError):
            PublicIdentity.from_bytes(bad)


def test_a_signature_is_for_one_purpose():
    signature = SENDER.sign("a", b"body")

    SENDER.public.verify("a", b"body", signature)
    for kind, body, made in [
        ("b", b"body", signature),
        ("a", b"bodY", signature),
        ("a", b"body", signature[:-1]),
        ("a", b"body", b""),
    ]:
        with pytest.raises(SealError):
            SENDER.public.verify(kind, body, made)
