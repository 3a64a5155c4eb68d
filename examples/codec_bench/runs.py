"""One run of one method: rounds, bytes, fidelity and times. Knows sessions; knows no files.

Times are processor time of the one thread that works, so that a busy machine does not show in them.
One code a round is decoded as the coordinator would, a different client's each round, and must give
what the device said it would.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

from compression.feedback import share_ahead
from examples.codec_bench.fleet import CLIENTS, F32, Fleet, Task
from examples.codec_bench.methods import METHODS
from examples.codec_bench.sessions import TAG_BYTES, Plan, Session, flat, named

EVERY = 5
"""Rounds between two looks at the held-out loss."""


class MethodError(RuntimeError):
    """A method's bytes do not say what it claims."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run gave.

    Attributes:
        losses: (rounds done, held-out loss).
        code_bytes: mean of an update's code and tag; codec_bytes: of codec files sent to one
            device over the run. `bytes` is what an update cost with its share of those.
        cosine, nmse: means over all updates, of decoded against update + what was owed.
        encode_ms, decode_ms: medians over all updates; encoding includes the device's own decoding.
        seconds: processor time of the whole run.
    """

    losses: tuple[tuple[int, float], ...]
    size: int
    rounds: int
    code_bytes: float
    codec_bytes: int
    cosine: float
    nmse: float
    encode_ms: float
    decode_ms: float
    seconds: float

    @property
    def bytes(self) -> float:
        """Mean bytes of an update, codec files included."""
        return self.code_bytes + self.codec_bytes / self.rounds

    @property
    def ratio(self) -> float:
        """Times fewer bytes than float32."""
        return 4 * self.size / self.bytes

    @property
    def drop(self) -> float:
        """How far the held-out loss fell."""
        return self.losses[0][1] - self.losses[-1][1]


@dataclass
class _Meter:
    sizes: list[int] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    encoding: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)


def measure(
    task: Task,
    method: str,
    ratio: float,
    *,
    seed: int,
    rounds: int,
    told: Callable[[int, float], None] = lambda done, loss: None,
) -> Measured:
    """Run `method` on `task`; `told` hears of every look at the held-out loss.

    Raises:
        MethodError: decoding gives something else than encoding promised.
    """
    began = time.process_time()
    fleet = Fleet(task, seed)
    plan = Plan(task.shapes, ratio, rounds, CLIENTS, seed)
    session = METHODS[method].make(plan)
    owed, steps = np.zeros((CLIENTS, plan.size), np.float32), np.zeros(CLIENTS)
    meter, losses = _Meter(), [(0, fleet.held_out_loss())]
    for round_ in range(rounds):
        total = np.zeros(plan.size)
        ahead = _ahead(owed, steps) if session.ahead else None
        for client, update in enumerate(fleet.local_updates(round_, ahead)):
            steps[client] = np.linalg.norm(flat(update, plan))
            decoded = _send(session, client, round_, update, plan, meter)
            _compare(decoded, update, owed[client], plan, meter, feedback=session.feedback)
            total += decoded
        mean = named((total / CLIENTS).astype(np.float32), plan)
        fleet.apply(mean)
        session.end_round(mean)
        if (round_ + 1) % EVERY == 0 or round_ + 1 == rounds:
            losses.append((round_ + 1, fleet.held_out_loss()))
            told(*losses[-1])
    return Measured(
        losses=tuple(losses),
        size=plan.size,
        rounds=rounds,
        code_bytes=float(np.mean(meter.sizes)) + TAG_BYTES,
        codec_bytes=session.codec_bytes,
        cosine=float(np.mean(meter.cosines)),
        nmse=float(np.mean(meter.errors)),
        encode_ms=1e3 * median(meter.encoding),
        decode_ms=1e3 * median(meter.decoding),
        seconds=time.process_time() - began,
    )


def _ahead(owed: F32, steps: npt.NDArray[np.float64]) -> F32:
    """How far ahead of the common adapter each client starts, (CLIENTS, size)."""
    debts = np.linalg.norm(owed, axis=1)
    shares = [share_ahead(float(debt), step) for debt, step in zip(debts, steps, strict=True)]
    return np.asarray(np.float32(shares)[:, None] * owed)


def _send(
    session: Session,
    client: int,
    round_: int,
    update: dict[str, F32],
    plan: Plan,
    meter: _Meter,
) -> F32:
    """What the coordinator reads of a client's update (size,)."""
    start = time.thread_time()
    promised, data = session.encode(client, round_, update)
    meter.encoding.append(time.thread_time() - start)
    meter.sizes.append(len(data))
    decoded = flat(promised, plan)
    if client == round_ % CLIENTS:
        start = time.thread_time()
        read = session.decode(client, round_, data)
        meter.decoding.append(time.thread_time() - start)
        if not np.array_equal(decoded, flat(read, plan)):
            raise MethodError(
                f"client {client}, round {round_}: the bytes decode to something else"
            )
    return decoded


def _compare(
    decoded: F32, update: dict[str, F32], owed: F32, plan: Plan, meter: _Meter, *, feedback: bool
) -> None:
    """Cosine and squared error against what should have been said; keep what was not."""
    wanted = flat(update, plan) + owed
    energy = float(wanted @ wanted)
    size = np.sqrt(energy * float(decoded @ decoded))
    error = wanted - decoded
    meter.cosines.append(float(wanted @ decoded) / size if size > 0 else 0.0)
    meter.errors.append(float(error @ error) / energy if energy > 0 else 0.0)
    if feedback:
        owed[:] = error


def kept(measured: Measured, reference: Sequence[tuple[int, float]]) -> float:
    """The share of the uncompressed run's progress that a method kept."""
    return measured.drop / (reference[0][1] - reference[-1][1])
