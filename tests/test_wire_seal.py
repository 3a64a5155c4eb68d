"""The envelope: what was sealed opens, and nothing else does."""

import random
import struct

import pytest

from edge_sdk.errors import LocalProtocolError, SealError
from edge_sdk.wire import seal as seal_module
from edge_sdk.wire.seal import (
    CHUNK_BYTES,
    SIGNATURE_BYTES,
    SUITE_HYBRID,
    SUITE_X25519,
    WRAP_BYTES,
    Header,
    Identity,
    Opener,
    Sealed,
    Sealer,
    chunk_hash,
    new_stream,
    open_chunks,
    peek_header,
    read_manifest,
    reseal,
    seal,
    unseal,
)

SENDER = Identity.from_bytes(bytes(range(64)))
RECIPIENTS = {
    SUITE_X25519: Identity.from_bytes(bytes(range(64, 128))),
    SUITE_HYBRID: Identity.from_bytes(bytes(range(64, 224))),
}
RECIPIENT = RECIPIENTS[SUITE_X25519]
INSIDER = Identity.from_bytes(bytes(range(128, 192)))
STREAM = bytes(range(16))


@pytest.fixture(autouse=True, params=RECIPIENTS, ids=["x25519", "hybrid"])
def suite(request, monkeypatch):
    """Every test here runs in both suites."""
    monkeypatch.setitem(globals(), "RECIPIENT", RECIPIENTS[request.param])
    return request.param


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


def opened(manifest: bytes, chunks) -> bytes:
    checked = read_manifest(
        manifest,
        SENDER.public,
        tenant="acme",
        sender_id="kitchen-1",
        recipient_id="coordinator",
    )
    return unseal(checked, chunks, RECIPIENT)


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
    assert overhead <= 270 + WRAP_BYTES[header.suite] + 48 * header.chunks


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


def test_streams_are_random():
    assert len({new_stream() for _ in range(100)}) == 100
    assert len(new_stream()) == 16


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


def test_the_wrap_has_the_size_the_layout_assumes(suite):
    _, wrap, hashes, signature = seal_module._split(sealed(b"x").manifest)

    assert (len(wrap), len(hashes), len(signature)) == (WRAP_BYTES[suite], 32, SIGNATURE_BYTES)


# --- chunk by chunk ---------------------------------------------------------------------------

FIELDS = {
    "tenant": "acme",
    "sender_id": "kitchen-1",
    "recipient_id": "coordinator",
    "kind": "AdapterUpdate",
    "task": "round-1",
    "stream": STREAM,
    "sequence": 7,
    "created_s": 1_000,
    "expires_s": 2_000,
}


def parts_of(message: bytes) -> list[bytes]:
    return [message[at : at + CHUNK_BYTES] for at in range(0, max(1, len(message)), CHUNK_BYTES)]


def begin(size: int, **changed) -> Sealer:
    keys = {"sender": SENDER.public, "recipient": RECIPIENT.public}
    return Sealer.begin(size, **(FIELDS | keys | changed))


def checked(manifest: bytes, recipient_id: str = "coordinator"):
    return read_manifest(
        manifest, SENDER.public, tenant="acme", sender_id="kitchen-1", recipient_id=recipient_id
    )


@pytest.mark.parametrize("size", [0, 5, CHUNK_BYTES, 2 * CHUNK_BYTES + 1])
def test_a_message_sealed_in_parts_opens_whole_and_in_parts(size):
    message = random.Random(size).randbytes(size)
    sealer = begin(size)

    chunks = [sealer.chunk(i, part) for i, part in enumerate(parts_of(message))]
    manifest = sealer.manifest(SENDER)

    assert opened(manifest, chunks) == message
    opener = Opener(checked(manifest), RECIPIENT)
    backwards = [opener.chunk(i, chunks[i]) for i in reversed(range(len(chunks)))]
    assert b"".join(reversed(backwards)) == message
    assert b"".join(open_chunks(checked(manifest), iter(chunks), RECIPIENT)) == message


def test_parts_come_in_order_and_in_full():
    sealer = begin(CHUNK_BYTES + 5)

    for index, part in [(1, b"5555x"), (-1, b"x"), (0, b"short"), (0, bytes(CHUNK_BYTES + 1))]:
        with pytest.raises(LocalProtocolError):
            sealer.chunk(index, part)
    sealer.chunk(0, bytes(CHUNK_BYTES))
    with pytest.raises(LocalProtocolError):
        sealer.manifest(SENDER)
    sealer.chunk(1, b"12345")
    with pytest.raises(LocalProtocolError):
        sealer.chunk(2, b"")


def test_one_nonce_never_sees_two_plaintexts():
    sealer = begin(5)
    first = sealer.chunk(0, b"first")

    assert sealer.chunk(0, b"first") == first
    with pytest.raises(SealError):
        sealer.chunk(0, b"other")


def test_only_the_sender_of_the_header_signs_the_manifest():
    sealer = begin(5)
    sealer.chunk(0, b"first")

    with pytest.raises(LocalProtocolError):
        sealer.manifest(INSIDER)


def test_any_chunk_comes_out_again_after_a_restart():
    message = random.Random(5).randbytes(2 * CHUNK_BYTES + 9)
    envelope = sealed(message)

    again = Sealer.again(envelope.manifest, envelope.file_key)

    for index in (2, 0, 1):
        part = parts_of(message)[index]
        assert again.chunk(index, part) == envelope.chunks[index]
        with pytest.raises(SealError):
            again.chunk(index, bytes(len(part)))
    assert again.manifest(SENDER) == envelope.manifest
    with pytest.raises(SealError):
        Sealer.again(b"not a manifest", envelope.file_key)


def test_a_chunk_out_of_its_place_does_not_open():
    envelope = sealed(random.Random(6).randbytes(2 * CHUNK_BYTES))
    opener = Opener(checked(envelope.manifest), RECIPIENT)

    for index, chunk in [(0, 1), (1, 0), (2, 0), (-1, 1)]:
        with pytest.raises(SealError):
            opener.chunk(index, envelope.chunks[chunk])


def test_what_was_kept_of_a_message_is_known_again():
    message = random.Random(9).randbytes(CHUNK_BYTES + 9)
    opener = Opener(checked(sealed(message).manifest), RECIPIENT)
    first, last = parts_of(message)

    assert opener.holds(0, first)
    assert opener.holds(1, last)
    for index, plaintext in [(0, last), (1, first), (1, bytes(9)), (2, b""), (-1, last)]:
        assert not opener.holds(index, plaintext)


def test_a_signed_hash_of_a_chunk_that_does_not_decrypt_is_refused():
    """A sender may sign nonsense; it must not come out as plaintext."""
    envelope = sealed(b"x" * 40)
    header, wrap, _, _ = seal_module._split(envelope.manifest)
    nonsense = bytes(56)
    head = header.encode()
    body = struct.pack(">H", len(head)) + head + wrap + chunk_hash(nonsense)
    manifest = body + SENDER.sign(seal_module._MANIFEST_TYPE, body)

    with pytest.raises(SealError):
        opened(manifest, [nonsense])


def test_chunks_that_end_early_are_not_a_message():
    envelope = sealed(random.Random(7).randbytes(2 * CHUNK_BYTES))
    chunks = open_chunks(checked(envelope.manifest), envelope.chunks[:1], RECIPIENT)

    assert len(next(chunks)) == CHUNK_BYTES
    with pytest.raises(SealError):
        next(chunks)


def test_a_message_for_a_hybrid_key_needs_one(suite):
    """A party without the hybrid key, to whom somebody seals as if it had one."""
    bare = Identity.from_bytes(RECIPIENT.to_bytes()[:64])
    header, *_ = seal_module._split(sealed(b"x").manifest)
    lying = Header(
        **{name: getattr(header, name) for name in Header.__slots__}
        | {"suite": SUITE_HYBRID, "recipient_key": bare.public.key_id(SUITE_HYBRID)}
    )
    manifest = seal_module.Manifest(lying, (), b"", bytes(WRAP_BYTES[SUITE_HYBRID]))

    with pytest.raises(SealError):
        Opener(manifest, bare)


# --- one body for many ------------------------------------------------------------------------


def test_a_broadcast_encrypts_once_and_each_device_opens_its_own():
    message = random.Random(8).randbytes(CHUNK_BYTES + 1)
    cohort = {f"device-{n}": Identity.generate(hybrid=n == 1) for n in range(3)}
    first = begin(len(message))
    chunks = [first.chunk(i, part) for i, part in enumerate(parts_of(message))]

    manifests = {}
    for number, (name, device) in enumerate(cohort.items()):
        other = {"recipient_id": name, "stream": bytes([number]) * 16, "sequence": number + 1}
        keys = {"recipient": device.public}
        manifests[name] = begin(len(message), body=first, **other, **keys).manifest(SENDER)

    for name, device in cohort.items():
        manifest = checked(manifests[name], name)
        assert unseal(manifest, chunks, device) == message
        assert manifest.header.suite == device.public.suite
        for stranger in cohort.keys() - {name}:
            with pytest.raises(SealError):
                unseal(manifest, chunks, cohort[stranger])


def test_a_member_of_a_cohort_cannot_pass_the_body_on_as_the_senders():
    """It knows the file key; a wrap and a signature are still the sender's alone."""
    message = b"for all of you"
    first = begin(len(message))
    first.chunk(0, message)
    header = peek_header(first.manifest(SENDER))

    forged = Sealer(
        header, first.file_key, seal_module._wrap(first.file_key, header, RECIPIENT.public)
    )
    forged.chunk(0, b"something else")

    with pytest.raises(LocalProtocolError):
        forged.manifest(INSIDER)


@pytest.mark.parametrize("changed", [{"task": "round-2"}, {"kind": "Scores"}, {"tenant": "other"}])
def test_only_recipients_differ_between_messages_of_one_body(changed):
    first = begin(5)
    first.chunk(0, b"first")

    with pytest.raises(LocalProtocolError):
        begin(5, body=first, **changed)
    with pytest.raises(LocalProtocolError):
        begin(6, body=first)
