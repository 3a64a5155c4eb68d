"""Two real endpoints joined by a link that drops, repeats and reorders."""

import contextlib
import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import FleetError, RemoteProtocolError, SealError
from edge_sdk.wire.seal import (
    CHUNK_BYTES,
    MAX_CHUNKS,
    Identity,
    Manifest,
    Opener,
    read_manifest,
    seal,
)
from edge_sdk.wire.transfer import (
    MAX_FRAME_BYTES,
    Chunk,
    Done,
    Frame,
    Have,
    Incoming,
    Offer,
    Outgoing,
    Refusal,
    Reject,
    Slow,
    Want,
    decode_frame,
    encode_frame,
    sign_done,
    sign_reject,
)

DEVICE = Identity.from_bytes(bytes(range(64)))
COORDINATOR = Identity.from_bytes(bytes(range(64, 128)))
STREAM = bytes(range(16))
LIMIT = 16 * 1024 * 1024


def envelope(message: bytes):
    return seal(
        message,
        tenant="acme",
        sender_id="kitchen-1",
        recipient_id="coordinator",
        kind="AdapterUpdate",
        task="round-1",
        stream=STREAM,
        sequence=1,
        created_s=1,
        expires_s=2,
        sender=DEVICE,
        recipient=COORDINATOR.public,
    )


def believed(manifest: bytes):
    return read_manifest(
        manifest,
        DEVICE.public,
        tenant="acme",
        sender_id="kitchen-1",
        recipient_id="coordinator",
    )


class Receiver:
    """The coordinator's end as the courier plays it; only `store` outlives a crash."""

    def __init__(self) -> None:
        self.store: dict[int, bytes] = {}
        self.message: bytes | None = None
        self.crash()

    def crash(self) -> None:
        self.incoming: Incoming | None = None

    def take(self, frame: Frame) -> list[Frame]:
        if isinstance(frame, Offer):
            manifest = believed(frame.manifest)
            if self.message is not None:
                return [sign_done(STREAM, manifest.digest, COORDINATOR)]
            self.incoming = self.incoming or incoming_of(manifest, self.store)
            return [self.incoming.want()]
        assert isinstance(frame, Chunk)
        if self.incoming is None:
            return []
        received = self.incoming.receive(frame)
        if received.piece is not None:
            self.store[frame.index] = received.piece
        if not received.complete:
            return list(received.reply)
        self.message = b"".join(self.store[index] for index in range(len(self.store)))
        return [sign_done(STREAM, self.incoming.manifest.digest, COORDINATOR)]


def incoming_of(manifest: Manifest, held: Iterable[int] = ()) -> Incoming:
    return Incoming(manifest, Opener(manifest, COORDINATOR), held, max_bytes=LIMIT)


def carry(frames: list[Frame]) -> list[Frame]:
    return [decode_frame(encode_frame(frame)) for frame in frames]


def run(outgoing: Outgoing, receiver: Receiver, rng: random.Random, *, loss: float) -> int:
    """Play until Done over a link that loses, repeats and swaps; return the chunks sent."""
    chunks_sent = 0
    up = outgoing.start()
    for _ in range(3000):
        if outgoing.done:
            return chunks_sent
        if not up:
            up = outgoing.resend()
        chunks_sent += sum(isinstance(frame, Chunk) for frame in up)
        down: list[Frame] = []
        for frame in carry(disturbed(up, rng, loss)):
            down += receiver.take(frame)
        if loss and rng.random() < 0.05:
            receiver.crash()
        up = []
        for frame in carry(disturbed(down, rng, loss)):
            assert not isinstance(frame, Offer | Chunk)
            up += outgoing.receive(frame)
    raise AssertionError("the transfer did not end")


def disturbed(frames: list[Frame], rng: random.Random, loss: float) -> list[Frame]:
    kept = [frame for frame in frames if rng.random() >= loss]
    if loss and kept and rng.random() < 0.3:
        kept.append(rng.choice(kept))
        swap = rng.randrange(len(kept))
        kept[0], kept[swap] = kept[swap], kept[0]
    return kept


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 40 * CHUNK_BYTES + 3])
def test_a_good_link_carries_each_chunk_once(size):
    message = random.Random(size).randbytes(size)
    sealed, receiver = envelope(message), Receiver()

    sent = run(Outgoing(STREAM, sealed, COORDINATOR.public), receiver, random.Random(0), loss=0)

    assert receiver.message == message
    assert sent == len(sealed.chunks)


@pytest.mark.parametrize("seed", range(20))
def test_a_bad_link_still_delivers(seed):
    rng = random.Random(seed)
    message = rng.randbytes(rng.randrange(30 * CHUNK_BYTES))
    receiver = Receiver()

    run(Outgoing(STREAM, envelope(message), COORDINATOR.public), receiver, rng, loss=0.3)

    assert receiver.message == message


def test_a_transfer_resumes_with_only_what_is_missing():
    message = random.Random(5).randbytes(32 * CHUNK_BYTES)
    sealed, receiver = envelope(message), Receiver()
    first = Outgoing(STREAM, sealed, COORDINATOR.public, window_bytes=8 * CHUNK_BYTES)
    frames = first.receive(receiver.take(first.start()[0])[0])
    for _ in range(3):
        answers = [answer for frame in frames for answer in receiver.take(frame)]
        frames = [frame for answer in answers for frame in first.receive(answer)]
    stored = len(receiver.store)
    receiver.crash()

    sent = run(Outgoing(STREAM, sealed, COORDINATOR.public), receiver, random.Random(0), loss=0)

    assert stored >= 16
    assert sent == 32 - stored
    assert receiver.message == message


def test_the_window_bounds_what_is_on_its_way():
    sealed = envelope(bytes(40 * CHUNK_BYTES))
    outgoing = Outgoing(STREAM, sealed, COORDINATOR.public, window_bytes=4 * CHUNK_BYTES)

    first = outgoing.receive(Want(STREAM, frozenset(range(40))))
    idle = outgoing.receive(Have(STREAM, 99, frozenset()))
    after = outgoing.receive(Have(STREAM, 1, frozenset({0, 1})))

    assert [frame.index for frame in first] == [0, 1, 2, 3]
    assert first[-1].ask
    assert len(idle) <= 1  # one step of growth, capped at the window given
    assert len(first) + len(idle) + len(after) - 2 <= 4


def test_what_went_out_before_the_chunk_that_asked_and_did_not_arrive_is_sent_again():
    outgoing = Outgoing(STREAM, envelope(bytes(4 * CHUNK_BYTES)), COORDINATOR.public)
    outgoing.receive(Want(STREAM, frozenset(range(4))))

    again = outgoing.receive(Have(STREAM, 3, frozenset({0, 2, 3})))

    assert [frame.index for frame in again] == [1]
    assert outgoing.acknowledged_chunks == 3


def test_silence_halves_the_window():
    outgoing = Outgoing(STREAM, envelope(bytes(40 * CHUNK_BYTES)), COORDINATOR.public)
    everything = Want(STREAM, frozenset(range(40)))
    assert len(outgoing.receive(everything)) == 16

    outgoing.resend()

    assert len(outgoing.receive(everything)) == 8


def test_a_loss_halves_the_window_once_for_all_that_went_out_with_it():
    outgoing = Outgoing(STREAM, envelope(bytes(200 * CHUNK_BYTES)), COORDINATOR.public)
    outgoing.receive(Want(STREAM, frozenset(range(200))))  # 0 to 15

    held = {0, 2, 4, 6, 7}
    outgoing.receive(Have(STREAM, 7, frozenset(held)))  # 1, 3 and 5 were lost: 8 may be out
    again = outgoing.receive(Have(STREAM, 15, frozenset(held | {10, 11, 12, 13, 15})))

    # 8, 9 and 14 were lost in the same crowd: the window stays at 8
    sent = [frame.index for frame in again]
    assert sent == [1, 3, 5, 8, 9, 14, 16, 17]


def test_slow_halves_the_window_and_sends_nothing():
    outgoing = Outgoing(STREAM, envelope(bytes(40 * CHUNK_BYTES)), COORDINATOR.public)
    everything = Want(STREAM, frozenset(range(40)))

    assert outgoing.receive(Slow(STREAM, 5)) == []

    assert len(outgoing.receive(everything)) == 8


def test_only_the_recipient_can_end_a_transfer():
    sealed = envelope(b"x")
    outgoing = Outgoing(STREAM, sealed, COORDINATOR.public)
    digest = believed(sealed.manifest).digest

    forgeries = [
        sign_done(STREAM, digest, DEVICE),
        sign_done(STREAM, bytes(32), COORDINATOR),
        sign_reject(STREAM, digest, Refusal.EXPIRED, "too late", DEVICE),
        Reject(STREAM, Refusal.REPEATED, "too late", sign_reject(
            STREAM, digest, Refusal.EXPIRED, "too late", COORDINATOR).signature),
        Done(STREAM, bytes(64)),
    ]  # fmt: skip
    for frame in forgeries:
        with pytest.raises(SealError):
            outgoing.receive(frame)
    assert not outgoing.done
    assert outgoing.rejected is None

    outgoing.receive(sign_done(STREAM, digest, COORDINATOR))
    assert outgoing.done


def test_a_reject_carries_its_reason():
    sealed = envelope(b"x")
    outgoing = Outgoing(STREAM, sealed, COORDINATOR.public)
    digest = believed(sealed.manifest).digest

    reject = sign_reject(STREAM, digest, Refusal.ENROLMENT, "ü" * 1000, COORDINATOR)
    outgoing.receive(carry([reject])[0])

    assert outgoing.rejected is not None
    assert outgoing.rejected.refusal is Refusal.ENROLMENT
    assert outgoing.rejected.reason == "ü" * 256
    assert outgoing.receive(Want(STREAM, frozenset({0}))) == []


def test_frames_about_chunks_that_do_not_exist_or_other_streams_are_refused():
    outgoing = Outgoing(STREAM, envelope(b"x"), COORDINATOR.public)

    for frame in (Want(STREAM, frozenset({1})), Have(STREAM, 0, frozenset({0, 9}))):
        with pytest.raises(RemoteProtocolError):
            outgoing.receive(frame)
    with pytest.raises(RemoteProtocolError):
        outgoing.receive(Want(bytes(16), frozenset()))


def test_a_foreign_chunk_is_refused_and_changes_nothing():
    sealed = envelope(bytes(2 * CHUNK_BYTES))
    incoming = incoming_of(believed(sealed.manifest))
    good = sealed.chunks[0]

    for chunk in (
        Chunk(STREAM, 0, False, good[:-1]),
        Chunk(STREAM, 0, False, bytes(len(good))),
        Chunk(STREAM, 1, False, good),
        Chunk(STREAM, 2, False, good),
        Chunk(bytes(16), 0, False, good),
    ):
        with pytest.raises(RemoteProtocolError):
            incoming.receive(chunk)
    assert incoming.held_chunks == 0


def test_a_message_over_the_ceiling_is_refused_by_its_manifest():
    sealed = envelope(bytes(CHUNK_BYTES + 1))

    manifest = believed(sealed.manifest)
    opener = Opener(manifest, COORDINATOR)
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        Incoming(manifest, opener, max_bytes=CHUNK_BYTES)


def test_completion_is_reported_once():
    sealed = envelope(b"x")
    incoming = incoming_of(believed(sealed.manifest))
    chunk = Chunk(STREAM, 0, True, sealed.chunks[0])

    assert incoming.receive(chunk).complete
    assert not incoming.receive(chunk).complete
    assert incoming.complete


stream = st.binary(min_size=16, max_size=16)
indices = st.frozensets(st.integers(0, MAX_CHUNKS - 1), max_size=40)
signature = st.binary(min_size=64, max_size=64)
frames = st.one_of(
    st.builds(Offer, stream, st.binary(max_size=300), st.sampled_from([b"", bytes(64)])),
    st.builds(Want, stream, indices),
    st.builds(Chunk, stream, st.integers(0, MAX_CHUNKS - 1), st.booleans(), st.binary(max_size=99)),
    st.builds(Have, stream, st.integers(0, 2**32 - 1), indices),
    st.builds(Done, stream, signature),
    st.builds(Slow, stream, st.integers(0, 2**16 - 1)),
    st.builds(Reject, stream, st.sampled_from(Refusal), st.text(max_size=100), signature),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(frame=frames)
def test_any_frame_survives_its_bytes(frame):
    assert decode_frame(encode_frame(frame)) == frame


@settings(max_examples=500, deadline=None, derandomize=True)
@given(data=st.one_of(st.binary(max_size=300), st.binary(max_size=99).map(lambda b: b"\6" + b)))
def test_any_bytes_give_a_frame_or_a_fleet_error(data):
    with contextlib.suppress(FleetError):
        decode_frame(data)


def test_cut_and_oversized_frames_are_refused():
    frame = encode_frame(sign_done(STREAM, bytes(32), DEVICE))
    for data in (b"", frame[:-1], frame + b"\0", bytes(MAX_FRAME_BYTES + 1)):
        with pytest.raises(RemoteProtocolError):
            decode_frame(data)
