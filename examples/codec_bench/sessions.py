"""A run of one method: what devices encode, what the coordinator reads, what that cost to set up.

Knows codecs' bytes and error feedback. Does not know models, training or the table.

A new federated codec is plugged in by one class with the four members of `Session` and one line in
`methods.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compression.baselines.method import Baseline
from compression.blocks import Layout
from compression.codec import Compressor, FeedbackState
from compression.errors import CodecError

F32 = npt.NDArray[np.float32]
Update = Mapping[str, F32]

TAG_BYTES = 16
"""Of the AEAD that seals every message; charged to every update of every method."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a method is told before a run.

    Attributes:
        shapes: of every tensor, in order.
        ratio: times fewer bytes than float32 wanted over the run, tag and codec files included;
            0 for a method whose rate is its own.
        rounds, clients: of the run; seed: of anything random.
    """

    shapes: Mapping[str, tuple[int, ...]]
    ratio: float
    rounds: int
    clients: int
    seed: int

    @property
    def size(self) -> int:
        """Coordinates of an update."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def allowance(self) -> int:
        """Bytes of one update's code, the tag taken off."""
        return int(4 * self.size / self.ratio) - TAG_BYTES


class Session(Protocol):
    """One method in one run. Everything a device keeps is kept per client.

    Attributes:
        feedback: whether what a code leaves out is added to the client's next update.
        ahead: whether a client's training starts ahead by what it owes (`compression/feedback.py`).
        codec_bytes: bytes of codec files that one device has been sent in the run so far.
    """

    feedback: bool
    ahead: bool
    codec_bytes: int

    def encode(self, client: int, round_: int, update: Update) -> tuple[Update, bytes]:
        """What the coordinator will read, and the bytes that say it, header included."""

    def decode(self, client: int, round_: int, data: bytes) -> Update:
        """The coordinator's reading of `data`: equal to what `encode` returned, bit for bit.

        Asked right after `encode` for one client of each round, to time and check it; so it must
        change nothing. What the coordinator keeps changes in `end_round`.
        """

    def end_round(self, mean: Update) -> None:
        """All clients have sent; `mean` of what was decoded is added to everyone's adapter."""


class Whole:
    """float32 as it is."""

    feedback = ahead = False
    codec_bytes = 0

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def encode(self, client: int, round_: int, update: Update) -> tuple[Update, bytes]:
        """As `Session.encode`."""
        return update, flat(update, self._plan).tobytes()

    def decode(self, client: int, round_: int, data: bytes) -> Update:
        """As `Session.decode`."""
        return named(np.frombuffer(data, np.float32), self._plan)

    def end_round(self, mean: Update) -> None:
        """Nothing to learn."""


class Peer:
    """A baseline of `compression/baselines`, with error feedback where it can have it.

    `make` gives a client its own baseline, from its first values; a method that is tuned to the
    byte budget looks at them.
    """

    ahead = False
    codec_bytes = 0

    def __init__(self, plan: Plan, make: Any, *, feedback: bool) -> None:
        self._plan, self._make, self.feedback = plan, make, feedback
        self._clients: dict[int, tuple[Baseline, F32, np.random.Generator]] = {}

    def encode(self, client: int, round_: int, update: Update) -> tuple[Update, bytes]:
        """As `Session.encode`."""
        values = flat(update, self._plan)
        if client not in self._clients:
            rng = np.random.default_rng([self._plan.seed, client])
            self._clients[client] = (self._make(values), np.zeros_like(values), rng)
        baseline, owed, rng = self._clients[client]
        wanted = values + owed
        data = baseline.encode(wanted, rng)
        decoded = baseline.decode(data, len(values))
        if self.feedback:
            owed[:] = wanted - decoded
        return named(decoded, self._plan), data

    def decode(self, client: int, round_: int, data: bytes) -> Update:
        """As `Session.decode`."""
        return named(self._clients[client][0].decode(data, self._plan.size), self._plan)

    def end_round(self, mean: Update) -> None:
        """Baselines learn nothing."""


class DeadZone:
    """The plain dead-zone quantizer with a range coder, to the byte budget."""

    feedback = True
    codec_bytes = 0

    def __init__(self, plan: Plan, *, ahead: bool = False) -> None:
        self._plan, self.ahead = plan, ahead
        layout = Layout(tuple(plan.shapes), tuple(plan.shapes.values()))
        self.codec = Compressor.deadzone(layout)
        self._owed: dict[int, FeedbackState] = {}

    def encode(self, client: int, round_: int, update: Update) -> tuple[Update, bytes]:
        """As `Session.encode`."""
        state = self._owed.setdefault(client, FeedbackState())
        encoded = self.codec.encode(update, state, self.target())
        return encoded.decoded, encoded.data

    def target(self) -> int:
        """Bytes of the next code."""
        return self._plan.allowance

    def decode(self, client: int, round_: int, data: bytes) -> Update:
        """As `Session.decode`."""
        return self.codec.decode(data)

    def end_round(self, mean: Update) -> None:
        """Nothing is learned."""


class Moving(DeadZone):
    """The product's codec: plain codes in the first round, then the basis of the last changes.

    Everyone holds the changes of the common adapter, so no codec is ever sent.
    """

    def __init__(self, plan: Plan, *, ahead: bool = False) -> None:
        super().__init__(plan, ahead=ahead)
        self._whole = Compressor.identity(self.codec.layout)

    def end_round(self, mean: Update) -> None:
        """Follow the adapter."""
        self.codec = self.codec.followed([self._whole.encode(dict(mean)).data])


class Learned(DeadZone):
    """The autoencoder that is sent as a file: plain codes in the first round, then learned ones.

    The codec is fitted once on the first round's decoded updates and sent to every device; where
    its file would take more than half of a device's budget for the run, the plain one stays.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, ahead=True)
        self._seen: list[Update] = []
        self._worth_it = True

    def encode(self, client: int, round_: int, update: Update) -> tuple[Update, bytes]:
        """As `Session.encode`."""
        decoded, data = super().encode(client, round_, update)
        if self.codec.basis is None:
            self._seen.append(decoded)
        return decoded, data

    def target(self) -> int:
        """Bytes of the next code, the codec file's share taken off."""
        return self._plan.allowance - self.codec_bytes // self._plan.rounds

    def end_round(self, mean: Update) -> None:
        """After the first round, learn; after the next one, where there was nothing to learn."""
        seen, self._seen = self._seen, []
        if self.codec.basis is not None or not self._worth_it:
            return
        try:
            learned = Compressor.fit(seen, layout=self.codec.layout)
        except CodecError:  # every code of the round was empty
            return
        size = len(learned.to_bytes())
        self._worth_it = 2 * size <= self._plan.allowance * self._plan.rounds
        if self._worth_it:
            self.codec, self.codec_bytes = learned, size


def flat(update: Update, plan: Plan) -> F32:
    """All values of an update, float32 (size,)."""
    parts = [np.asarray(update[name], np.float32).reshape(-1) for name in plan.shapes]
    return np.concatenate(parts)


def named(values: F32, plan: Plan) -> dict[str, F32]:
    """The tensors of values (size,)."""
    found, start = {}, 0
    for name, shape in plan.shapes.items():
        count = int(np.prod(shape))
        found[name] = values[start : start + count].reshape(shape)
        start += count
    return found
