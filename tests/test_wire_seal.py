"""The envelope: what was sealed opens, and nothing else does."""

import contextlib
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import FleetError, LocalProtocolError, RemoteProtocolError, SealError
from edge_sdk.wire import seal as seal_module
from edge_sdk.wire.seal import (
    CHUNK_BYTES,
    SIGNATURE_BYTES,
    WRAP_BYTES,
    Header,
    Identity,
    PublicIdentity,
    Sealed,
    peek_header,
    read_manifest,
    reseal,
    seal,
    unseal,
)

SENDER = Identity.from_bytes(bytes(range(64)))
RECIPIENT = Identity.from_bytes(bytes(range(64, 128)))
INSIDER = Identity.from_bytes(bytes(range(128, 192)))
STREAM = bytes(range(16))


def sealed(plaintext: bytes, **changed) -> Sealed:
    fields = {
        "tenant": "acme",
        "sender_id": "kitchen-1",
        "recipient_id": "coordinator",
        "kind": "AdapterUpdate",
        "task": "round-1",
        "stream": STREAM,
        "sequence": 7,
        "created_s": 1_000,
        "expires_s": 2_000,
        "sender": SENDER,
        "recipient": RECIPIENT.public,
    }
    return seal(plaintext, **(fields | changed))


def opened(manifest: bytes, chunks, *, recipient: Identity = RECIPIENT) -> bytes:
    checked = read_manifest(
        manifest,
        SENDER.public,
        tenant="acme",
        sender_id="kitchen-1",
        recipient_id="coordinator",
    )
    return unseal(checked, chunks, recipient)


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5]
)
def test_what_was_sealed_opens(size):
    message = random.Random(size).randbytes(size)

    envelope = sealed(message)

    assert opened(envelope.manifest, envelope.chunks) == message
    header = peek_header(envelope.manifest)
    assert (header.plaintext_bytes, header.chunks) == (size, len(envelope.chunks))
    overhead = len(envelope.manifest) + sum(map(len, envelope.chunks)) - size
    assert overhead <= 350 + 48 * header.chunks


def test_plaintext_and_file_key_are_not_in_the_envelope():
    message = b"a private sentence " * 10
    envelope = sealed(message)

    everything = envelope.manifest + b"".join(envelope.chunks)

    assert b"private" not in everything
    assert envelope.file_key not in everything
    assert envelope.file_key.hex() not in repr(envelope)


def test_every_changed_manifest_bit_is_refused():
    envelope = sealed(b"x" * 100)

    for at in range(len(envelope.manifest)):
        for bit in range(8):
            changed = bytearray(envelope.manifest)
            changed[at] ^= 1 << bit
            with pytest.raises(SealError):
                opened(bytes(changed), envelope.chunks)


def test_every_truncated_or_extended_manifest_is_refused():
    envelope = sealed(b"x" * (CHUNK_BYTES + 1))

    for length in range(len(envelope.manifest)):
        with pytest.raises(SealError):
            opened(envelope.manifest[:length], envelope.chunks)
    with pytest.raises(SealError):
        opened(envelope.manifest + b"\0", envelope.chunks)


def test_two_thousand_changed_chunk_bits_are_refused():
    envelope = sealed(random.Random(1).randbytes(2 * CHUNK_BYTES + 9))
    rng = random.Random(2)

    for _ in range(2000):
        index = rng.randrange(3)
        chunk = bytearray(envelope.chunks[index])
        chunk[rng.randrange(len(chunk))] ^= 1 << rng.randrange(8)
        chunks = [*envelope.chunks]
        chunks[index] = bytes(chunk)
        with pytest.raises(SealError):
            opened(envelope.manifest, chunks)


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda c, o: [],
        lambda c, o: c[:-1],
        lambda c, o: c[1:],
        lambda c, o: [*c, c[-1]],
        lambda c, o: [c[0], c[0], *c[2:]],
        lambda c, o: [c[1], c[0], *c[2:]],
        lambda c, o: [o[0], *c[1:]],
        lambda c, o: [*c[:-1], b""],
        lambda c, o: [b"".join(c)],
    ],
    ids=["none", "cut", "headless", "more", "twice", "swapped", "mixed", "empty-last", "joined"],
)
def test_rearranged_chunks_are_refused(rearrange):
    message = random.Random(3).randbytes(2 * CHUNK_BYTES + 9)
    envelope, other = sealed(message), sealed(message)

    with pytest.raises(SealError):
        opened(envelope.manifest, rearrange(list(envelope.chunks), list(other.chunks)))


def test_no_chunks_are_not_an_empty_message():
    """The first prototype of this envelope accepted exactly this."""
    envelope = sealed(b"")

    with pytest.raises(SealError):
        opened(envelope.manifest, [])


def test_an_insider_who_signs_anothers_ciphertext_as_his_own_gets_nothing():
    envelope = sealed(b"the victim's update")
    theirs = seal_module._split(envelope.manifest)
    header = theirs[0]
    names = {name: getattr(header, name) for name in Header.__slots__}
    own = Header(**(names | {"sender": "garden-2", "sender_key": INSIDER.public.sign_id})).encode()
    body = struct.pack(">H", len(own)) + own + theirs[1] + theirs[2]
    manifest = body + INSIDER.sign(seal_module._MANIFEST_TYPE, body)

    checked = read_manifest(
        manifest, INSIDER.public, tenant="acme", sender_id="garden-2", recipient_id="coordinator"
    )

    with pytest.raises(SealError):
        unseal(checked, envelope.chunks, RECIPIENT)


def test_a_wrap_moved_to_another_message_of_the_same_sender_is_refused():
    first, second = sealed(b"first"), sealed(b"other", sequence=8)
    header, _, hashes, _ = seal_module._split(second.manifest)
    wrap = seal_module._split(first.manifest)[1]
    header = header.encode()
    body = struct.pack(">H", len(header)) + header + wrap + hashes
    manifest = body + SENDER.sign(seal_module._MANIFEST_TYPE, body)

    with pytest.raises(SealError):
        opened(manifest, second.chunks)


@pytest.mark.parametrize(
    "changed",
    [
        {"tenant": "other"},
        {"sender_id": "kitchen-2"},
        {"recipient_id": "kitchen-1"},
        {"sender": INSIDER},
        {"recipient": INSIDER.public},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_tenant_sender_or_recipient_is_refused(changed):
    envelope = sealed(b"x", **changed)

    with pytest.raises(SealError):
        opened(envelope.manifest, envelope.chunks)


def test_a_signature_for_another_purpose_is_refused():
    envelope = sealed(b"x")
    body = envelope.manifest[:-SIGNATURE_BYTES]

    with pytest.raises(SealError):
        opened(body + SENDER.sign("symbiont/v1/done", body), envelope.chunks)


def test_resealing_gives_the_same_stream_and_only_for_the_same_message():
    message = random.Random(4).randbytes(CHUNK_BYTES + 1)
    envelope = sealed(message)

    assert reseal(message, envelope.manifest, envelope.file_key) == envelope
    for wrong in (message[:-1], message[:-1] + b"\0", b""):
        with pytest.raises(SealError):
            reseal(wrong, envelope.manifest, envelope.file_key)
    with pytest.raises(SealError):
        reseal(message, envelope.manifest, bytes(32))


def test_expiry_is_judged_by_the_time_given():
    header = peek_header(sealed(b"x").manifest)

    assert not header.expired(1_999)
    assert header.expired(2_000)


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
        sealed(b"x", **changed)


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
    header = Header(
        1, 1, tenant, sender, ids[0], recipient, ids[1], kind, task, stream, *numbers, size,
        CHUNK_BYTES, seal_module.count_chunks(size),
    )  # fmt: skip

    assert Header.decode(header.encode()) == header


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.binary(max_size=600))
def test_any_bytes_give_a_header_or_a_fleet_error(data):
    for parse in (Header.decode, peek_header, PublicIdentity.from_bytes):
        with contextlib.suppress(FleetError):
            parse(data)


def test_a_header_that_claims_too_much_is_refused_before_anything_is_allocated():
    header = peek_header(sealed(b"x").manifest).encode()
    numbers = struct.Struct(">QQII")  # expires, plaintext, chunk size, chunks
    for plaintext, chunk, chunks in [
        (2**62, CHUNK_BYTES, 2**31),
        (1, CHUNK_BYTES, 2**32 - 1),
        (1, 1, 1),
        (0, CHUNK_BYTES, 0),
    ]:
        lying = header[: -numbers.size] + numbers.pack(2_000, plaintext, chunk, chunks)
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


def test_the_wrap_has_the_size_the_layout_assumes():
    _, wrap, hashes, signature = seal_module._split(sealed(b"x").manifest)

    assert (len(wrap), len(hashes), len(signature)) == (WRAP_BYTES[1], 32, SIGNATURE_BYTES)
