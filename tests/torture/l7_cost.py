"""L7: what sealing and opening cost, in time and in bytes.

Knows the whole-message and the chunk-wise way. Does not know transfers or storage.

Times are the median of several runs, on the clock of this thread's processor time, so that
whatever else runs on the machine does not count; the wall clock is in the notes.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from edge_sdk.wire.header import CHUNK_BYTES
from edge_sdk.wire.seal import (
    Identity,
    Manifest,
    Opener,
    Sealed,
    Sealer,
    new_stream,
    read_manifest,
    seal,
    unseal,
)
from tests.torture.result import Result, Scale

MIB = 2**20
LIMIT_MS, LIMIT_PERCENT = 60.0, 0.2
RUNS = {Scale.SHORT: 3, Scale.FULL: 15}


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Measure both suites; the slower one is the figure."""
    value: dict[str, float] = {}
    walls: dict[str, float] = {}
    sender = Identity.generate()
    plain = bytes(16 * MIB)
    for suite, hybrid in (("x25519", False), ("hybrid", True)):
        recipient = Identity.generate(hybrid=hybrid)
        sealed = _seal(bytes(MIB), sender, recipient)
        size = len(sealed.manifest) + sum(map(len, sealed.chunks))
        # The goal is for the default suite; ML-KEM's 1,088 bytes alone are 0.1 % of 1 MiB.
        place = walls if hybrid else value
        place[f"overhead % at 1 MiB, {suite}"] = round(100 * (size / MIB - 1), 4)
        envelope = _seal(plain, sender, recipient)
        steps: dict[str, Callable[[], object]] = {
            "seal": lambda to=recipient: _seal(plain, sender, to),  # type: ignore[misc]
            "open": lambda to=recipient, e=envelope: _open(e, sender, to),  # type: ignore[misc]
            "seal by chunk": lambda to=recipient: _seal_chunks(plain, sender, to),  # type: ignore[misc]
            "open by chunk": lambda to=recipient, e=envelope: _open_chunks(e, sender, to),  # type: ignore[misc]
        }
        for name, step in steps.items():
            used, wall = _median_ms(step, RUNS[scale])
            value[f"{name} ms, {suite}"] = used
            walls[f"{name} wall ms, {suite}"] = wall
    quick = all(v < LIMIT_MS for name, v in value.items() if " ms" in name)
    small = all(v < LIMIT_PERCENT for name, v in value.items() if "overhead" in name)
    return Result(
        "L7",
        "cost of seal and open",
        value,
        "ms of processor time for 16 MiB; %",
        f"16 MiB < {LIMIT_MS:.0f} ms each, overhead < {LIMIT_PERCENT} % at 1 MiB",
        quick and small,
        notes=dict(walls),
    )


def _median_ms(step: Callable[[], object], runs: int) -> tuple[float, float]:
    used, walls = [], []
    for _ in range(runs):
        cpu, wall = time.thread_time(), time.perf_counter()
        step()
        used.append(time.thread_time() - cpu)
        walls.append(time.perf_counter() - wall)
    return round(1000 * statistics.median(used), 2), round(1000 * statistics.median(walls), 2)


def _fields(sender: Identity, recipient: Identity) -> dict[str, object]:
    return {
        "tenant": "acme",
        "sender_id": "kitchen-1",
        "recipient_id": "coordinator",
        "kind": "File",
        "task": "t",
        "stream": new_stream(),
        "sequence": 1,
        "created_s": 1,
        "expires_s": 2,
        "recipient": recipient.public,
    }


def _seal(plain: bytes, sender: Identity, recipient: Identity) -> Sealed:
    return seal(plain, sender=sender, **_fields(sender, recipient))  # type: ignore[arg-type]


def _checked(envelope: Sealed, sender: Identity) -> Manifest:
    names = {"tenant": "acme", "sender_id": "kitchen-1", "recipient_id": "coordinator"}
    return read_manifest(envelope.manifest, sender.public, **names)


def _open(envelope: Sealed, sender: Identity, recipient: Identity) -> bytes:
    return unseal(_checked(envelope, sender), envelope.chunks, recipient)


def _seal_chunks(plain: bytes, sender: Identity, recipient: Identity) -> bytes:
    fields = _fields(sender, recipient)
    sealer = Sealer.begin(len(plain), sender=sender.public, **fields)  # type: ignore[arg-type]
    view = memoryview(plain)
    for index in range(sealer.header.chunks):
        sealer.chunk(index, view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
    return sealer.manifest(sender)


def _open_chunks(envelope: Sealed, sender: Identity, recipient: Identity) -> None:
    opener = Opener(_checked(envelope, sender), recipient)
    for index, chunk in enumerate(envelope.chunks):
        opener.chunk(index, chunk)
