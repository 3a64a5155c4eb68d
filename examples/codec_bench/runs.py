"""One run of one method: rounds, bytes, fidelity and times. Knows sessions; knows no files.

Times are processor time of the one thread that works, so that a busy machine does not show in them.
One code a round is decoded as the coordinator would, a different client's each round, and must give
what the device said it would.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from compression.feedback import share_ahead
from examples.codec_bench.fleet import CLIENTS, F32, Fleet, Task
from examples.codec_bench.methods import METHODS
from examples.codec_bench.sessions import TAG_BYTES, Plan, Session, Update, flat, named

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


class Uplink:
    """Every client's way to the coordinator: its codec, what it owes, how well it was understood.

    Attributes:
        sizes: bytes of every code; cosines, errors: of what was decoded against update + what was
            owed; encoding, decoding: processor seconds.
    """

    def __init__(self, plan: Plan, session: Session) -> None:
        self.plan, self.session = plan, session
        self.sizes: list[int] = []
        self.cosines: list[float] = []
        self.errors: list[float] = []
        self.encoding: list[float] = []
        self.decoding: list[float] = []
        self._owed = np.zeros((plan.clients, plan.size), np.float32)
        self._steps = np.zeros(plan.clients)

    def ahead(self) -> F32 | None:
        """How far ahead of the common adapter each client starts, (clients, size); None: not."""
        if not self.session.ahead:
            return None
        debts = np.linalg.norm(self._owed, axis=1)
        pairs = zip(debts, self._steps, strict=True)
        shares = [share_ahead(float(debt), step) for debt, step in pairs]
        return np.asarray(np.float32(shares)[:, None] * self._owed)

    def send(self, client: int, round_: int, update: Update) -> F32:
        """What the coordinator reads of a client's update (size,).

        Raises:
            MethodError: decoding gives something else than encoding promised.
        """
        start = time.thread_time()
        promised, data = self.session.encode(client, round_, update)
        self.encoding.append(time.thread_time() - start)
        self.sizes.append(len(data))
        decoded = flat(promised, self.plan)
        if client == round_ % self.plan.clients:
            start = time.thread_time()
            read = self.session.decode(client, round_, data)
            self.decoding.append(time.thread_time() - start)
            if not np.array_equal(decoded, flat(read, self.plan)):
                raise MethodError(
                    f"client {client}, round {round_}: the bytes decode to something else"
                )
        self._compare(client, flat(update, self.plan), decoded)
        return decoded

    def _compare(self, client: int, update: F32, decoded: F32) -> None:
        self._steps[client] = np.linalg.norm(update)
        wanted = update + self._owed[client]
        energy = float(wanted @ wanted)
        size = np.sqrt(energy * float(decoded @ decoded))
        error = wanted - decoded
        self.cosines.append(float(wanted @ decoded) / size if size > 0 else 0.0)
        self.errors.append(float(error @ error) / energy if energy > 0 else 0.0)
        if self.session.feedback:
            self._owed[client] = error


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
    uplink = Uplink(plan, METHODS[method].make(plan))
    losses = [(0, fleet.held_out_loss())]
    for round_ in range(rounds):
        total = np.zeros(plan.size)
        for client, update in enumerate(fleet.local_updates(round_, uplink.ahead())):
            total += uplink.send(client, round_, update)
        mean = named((total / CLIENTS).astype(np.float32), plan)
        fleet.apply(mean)
        uplink.session.end_round(mean)
        if (round_ + 1) % EVERY == 0 or round_ + 1 == rounds:
            losses.append((round_ + 1, fleet.held_out_loss()))
            told(*losses[-1])
    return Measured(
        losses=tuple(losses),
        size=plan.size,
        rounds=rounds,
        code_bytes=float(np.mean(uplink.sizes)) + TAG_BYTES,
        codec_bytes=uplink.session.codec_bytes,
        cosine=float(np.mean(uplink.cosines)),
        nmse=float(np.mean(uplink.errors)),
        encode_ms=1e3 * median(uplink.encoding),
        decode_ms=1e3 * median(uplink.decoding),
        seconds=time.process_time() - began,
    )


def kept(measured: Measured, reference: Sequence[tuple[int, float]]) -> float:
    """The share of the uncompressed run's progress that a method kept."""
    return measured.drop / (reference[0][1] - reference[-1][1])
