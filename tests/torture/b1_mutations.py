"""B1: whatever is done to an envelope on its way, it does not open, and only SealError says so.

Knows the layout of an envelope and what a broker, an insider or another tenant could do to it. Does
not know transfers: every case goes straight to `read_manifest` and `unseal`.

What is tried, for both suites and several sizes: every bit of the manifest, every length of it,
random bits of chunks, every rearrangement of the chunks (none at all among them), manifests spliced
from two envelopes, whole parts and chunks of another tenant, task, recipient and sender, and a
header rewritten and signed by an insider in every field.
"""

import random
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge_sdk.errors import SealError
from edge_sdk.wire import seal as seal_module
from edge_sdk.wire.header import CHUNK_BYTES, Header, count_chunks
from edge_sdk.wire.seal import (
    Identity,
    PublicIdentity,
    Sealed,
    new_stream,
    read_manifest,
    seal,
    unseal,
)
from tests.torture.result import Result, Scale, say

SIZES = (0, 40, 1_000, CHUNK_BYTES + 77)
LIMIT_MS = 5.0
FULL_CASES = 100_000
SHORT_CASES = 4_000
_MANIFEST_TYPE = seal_module._MANIFEST_TYPE


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that must not open. `signer` and `sender_id` are whom the receiver expects."""

    kind: str
    manifest: bytes
    chunks: Sequence[bytes]
    signer: PublicIdentity
    sender_id: str = "kitchen-1"
    tenant: str = "acme"


@dataclass(frozen=True, slots=True)
class World:
    """The parties: an honest sender, an insider of the same tenant, a receiver, a stranger."""

    rng: random.Random
    sender: Identity
    insider: Identity
    receiver: Identity
    stranger: Identity

    def seal(self, size: int, **changed: object) -> Sealed:
        """Return an honest envelope of `size` random bytes."""
        fields = {
            "tenant": "acme",
            "sender_id": "kitchen-1",
            "recipient_id": "coordinator",
            "kind": "AdapterUpdate",
            "task": "round-1",
            "stream": new_stream(),
            "sequence": 7,
            "created_s": 1_000,
            "expires_s": 2_000,
            "sender": self.sender,
            "recipient": self.receiver.public,
        }
        return seal(self.rng.randbytes(size), **(fields | changed))  # type: ignore[arg-type]

    def opens(self, case: Case) -> bool:
        """Return whether the receiver takes it; any error but SealError flies."""
        try:
            manifest = read_manifest(
                case.manifest,
                case.signer,
                tenant=case.tenant,
                sender_id=case.sender_id,
                recipient_id="coordinator",
            )
            unseal(manifest, case.chunks, self.receiver)
        except SealError:
            return False
        return True


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Try every systematic case, then random ones until there are enough."""
    wanted = FULL_CASES if scale is Scale.FULL else SHORT_CASES
    tried: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    foreign: Counter[str] = Counter()
    slowest, untouched = 0.0, 0
    for number, hybrid in enumerate((False, True)):
        world = make_world(seed + number, hybrid=hybrid)
        untouched += sum(_honest_opens(world, size) for size in SIZES)
        share = wanted * (number + 1) // 2
        for case in cases(world, thin=scale is Scale.SHORT):
            began = time.thread_time()
            try:
                accepted[case.kind] += world.opens(case)
            except Exception as exc:
                foreign[f"{case.kind}: {type(exc).__name__}"] += 1
            slowest = max(slowest, time.thread_time() - began)
            tried[case.kind] += 1
            if tried.total() % 20_000 == 0:
                say("B1", f"{tried.total()} tried, {accepted.total()} accepted")
            if tried.total() >= share:
                break
    quick = slowest * 1000 < LIMIT_MS
    clean = accepted.total() == 0 and foreign.total() == 0 and untouched == 2 * len(SIZES)
    return Result(
        "B1",
        "envelope mutations",
        accepted.total(),
        f"accepted of {tried.total()}",
        "0 accepted, only SealError, < 5 ms each",
        clean and quick and tried.total() >= wanted,
        notes={
            "tried": dict(tried),
            "accepted": {kind: count for kind, count in accepted.items() if count},
            "other errors": dict(foreign),
            "slowest ms of processor time": round(slowest * 1000, 2),
            "untouched envelopes that opened": untouched,
        },
    )


def make_world(seed: int, *, hybrid: bool) -> World:
    """Return parties whose keys follow from the seed."""
    rng = random.Random(seed)
    keys = [Identity.from_bytes(rng.randbytes(160 if hybrid else 64)) for _ in range(4)]
    return World(rng, *keys)


def _honest_opens(world: World, size: int) -> bool:
    envelope = world.seal(size)
    return world.opens(Case("honest", envelope.manifest, envelope.chunks, world.sender.public))


# --- what is tried ----------------------------------------------------------------------------


def cases(world: World, *, thin: bool) -> Iterator[Case]:
    """Yield the systematic cases once (`thin`: few of the bits), then random ones for ever."""
    signer = world.sender.public
    for size in SIZES:
        envelope, other = world.seal(size), world.seal(size, task="round-2", sequence=8)
        yield from _chunk_lists(world, envelope, other, signer)
        yield from _others(world, size, signer)
        yield from _splices(envelope, other, signer)
        yield from _resigned(world, envelope)
        step = 97 if thin else 1
        yield from _bits(envelope, signer, step)
        yield from _lengths(envelope, signer, step // 9 + 1)
    while True:
        yield from _random_cases(world, signer)


def _bits(envelope: Sealed, signer: PublicIdentity, step: int) -> Iterator[Case]:
    for bit in range(0, 8 * len(envelope.manifest), step):
        yield Case("manifest bit", _flip(envelope.manifest, bit), envelope.chunks, signer)


def _lengths(envelope: Sealed, signer: PublicIdentity, step: int) -> Iterator[Case]:
    for length in range(0, len(envelope.manifest), step):
        yield Case("manifest cut", envelope.manifest[:length], envelope.chunks, signer)
    for more in (b"\0", bytes(32), envelope.manifest):
        yield Case("manifest longer", envelope.manifest + more, envelope.chunks, signer)


def _chunk_lists(
    world: World, envelope: Sealed, other: Sealed, signer: PublicIdentity
) -> Iterator[Case]:
    chunks, others = list(envelope.chunks), list(other.chunks)
    lists: dict[str, list[bytes]] = {
        "no chunks": [],
        "one empty chunk": [b""],
        "last dropped": chunks[:-1],
        "first dropped": chunks[1:],
        "last twice": [*chunks, chunks[-1]],
        "first twice": [chunks[0], *chunks],
        "an empty one more": [*chunks, b""],
        "joined": [b"".join(chunks), b""],
        "of another message": others,
        "last of another": [*chunks[:-1], others[-1]],
        "first of another": [others[0], *chunks[1:]],
        "both": chunks + others,
        "cut": [*chunks[:-1], chunks[-1][:-1]],
        "longer": [*chunks[:-1], chunks[-1] + b"\0"],
        "only the tag": [*chunks[:-1], chunks[-1][-16:] if len(chunks[-1]) > 16 else b""],
    }
    if len(chunks) > 1:
        lists |= {"swapped": chunks[::-1], "one for all": [chunks[0]] * len(chunks)}
    for name, changed in lists.items():
        yield Case(f"chunks: {name}", envelope.manifest, changed, signer)


def _others(world: World, size: int, signer: PublicIdentity) -> Iterator[Case]:
    """Honest envelopes that were meant for somebody else."""
    own = world.seal(size)
    changed: dict[str, dict[str, object]] = {
        "tenant": {"tenant": "other"},
        "sender id": {"sender_id": "kitchen-2"},
        "recipient id": {"recipient_id": "kitchen-1"},
        "sender key": {"sender": world.stranger},
        "recipient key": {"recipient": world.stranger.public},
        "task": {"task": "round-2"},
    }
    for kind, changes in changed.items():
        theirs = world.seal(size, **changes)
        if (
            kind != "task"
        ):  # another task alone is an honest message: the mailbox knows if it is new
            yield Case(f"cross-{kind}", theirs.manifest, theirs.chunks, signer)
        yield Case(f"cross-{kind} chunks", own.manifest, theirs.chunks, signer)
        yield Case(f"cross-{kind} manifest", theirs.manifest, own.chunks, signer)
    yield Case("expected elsewhere", own.manifest, own.chunks, signer, tenant="other")
    yield Case("expected of another", own.manifest, own.chunks, world.insider.public)


def _splices(envelope: Sealed, other: Sealed, signer: PublicIdentity) -> Iterator[Case]:
    """The first parts of one manifest with the last parts of another, cut at every part."""
    for first, second in ((envelope, other), (other, envelope)):
        a, b = _parts(first.manifest), _parts(second.manifest)
        for mask in range(1, 2 ** len(a) - 1):
            mixed = b"".join(
                y if mask >> i & 1 else x for i, (x, y) in enumerate(zip(a, b, strict=True))
            )
            for chunks in (first.chunks, second.chunks):
                yield Case("splice", mixed, chunks, signer)


def _resigned(world: World, envelope: Sealed) -> Iterator[Case]:
    """The signature stripped, the header rewritten and signed by an insider as his own."""
    header, wrap, hashes, _ = seal_module._split(envelope.manifest)
    insider = world.insider
    own = replace(header, sender="kitchen-2", sender_key=insider.public.sign_id)
    second = insider.public.key_id(header.suite)
    rewritten = [
        own,
        replace(own, kind="Refused"),
        replace(own, task="round-2"),
        replace(own, stream=bytes(16)),
        replace(own, sequence=99),
        replace(own, created_s=0),
        replace(own, expires_s=2**62),
        replace(own, recipient_key=second),
        replace(own, suite=3 - header.suite),
        replace(own, sender="kitchen-1"),  # the victim's name, the insider's key
        replace(own, sender_key=world.sender.public.sign_id),
        replace(own, plaintext_bytes=header.plaintext_bytes + 1),
        replace(own, plaintext_bytes=0, chunks=1),
    ]
    for changed in rewritten:
        if changed.chunks != count_chunks(changed.plaintext_bytes):
            continue
        for name in ("kitchen-2", "kitchen-1"):
            manifest = _sign(changed, wrap, hashes, insider)
            yield Case("re-signed", manifest, envelope.chunks, insider.public, name)
            yield Case("re-signed, no chunks", manifest, [], insider.public, name)
    victim = _sign(header, wrap, hashes, insider)
    yield Case("signed by another", victim, envelope.chunks, world.sender.public)


def _random_cases(world: World, signer: PublicIdentity) -> Iterator[Case]:
    rng = world.rng
    size = rng.choice((0, 1, 31, 300, rng.randrange(2_000)))
    envelope, other = world.seal(size), world.seal(size, sequence=8)
    large = world.seal(CHUNK_BYTES + rng.randrange(200))
    for _ in range(400):
        at = rng.randrange(len(envelope.chunks[0]) * 8)
        yield Case("chunk bit", envelope.manifest, [_flip(envelope.chunks[0], at)], signer)
        bits = rng.sample(range(8 * len(envelope.manifest)), rng.randrange(2, 6))
        manifest = envelope.manifest
        for bit in bits:
            manifest = _flip(manifest, bit)
        yield Case("manifest bits", manifest, envelope.chunks, signer)
        cut, end = sorted(rng.sample(range(len(envelope.manifest)), 2))
        mixed = other.manifest[:cut] + envelope.manifest[cut:end] + other.manifest[end:]
        if mixed != other.manifest:
            yield Case("spliced anywhere", mixed, other.chunks, signer)
        junk = rng.randbytes(rng.randrange(400))
        yield Case("noise", junk, envelope.chunks, signer)
    for index, chunk in enumerate(large.chunks):
        for _ in range(10):
            chunks = list(large.chunks)
            chunks[index] = _flip(chunk, rng.randrange(8 * len(chunk)))
            yield Case("large chunk bit", large.manifest, chunks, signer)
    yield from _resigned(world, envelope)


# --- tools ------------------------------------------------------------------------------------


def _flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _parts(manifest: bytes) -> list[bytes]:
    """Return (length and header, wrap, hashes, signature)."""
    header, wrap, hashes, signature = seal_module._split(manifest)
    return [_head(header), wrap, hashes, signature]


def _head(header: Header) -> bytes:
    data = header.encode()
    return struct.pack(">H", len(data)) + data


def _sign(header: Header, wrap: bytes, hashes: bytes, signer: Identity) -> bytes:
    body = _head(header) + wrap + hashes
    return body + signer.sign(_MANIFEST_TYPE, body)
