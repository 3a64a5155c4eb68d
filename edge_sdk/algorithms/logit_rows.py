"""What a model finds likeliest at each place of some texts: a few log-probabilities, never a row
of a vocabulary.

Knows arrays and their bytes. Does not know models, tokenizers or messages.

A *place* is one token to be predicted; its row is the distribution that the model gave for that
very token before it read it. So there is no shift to get wrong: row n speaks of `tokens[n]`.

Log-probabilities are taken over the whole vocabulary, so what the k kept leave out is known: the
tail has the mass 1 - sum(exp(logps)), and nobody renormalises it away. The token that really
follows has its log-probability apart, in 32 bits, whether or not it is among the k. Summed it is
the cross-entropy by which FedMKT chooses teachers, and as it must agree with the k kept, a device
that claims a low loss has to teach what is true (`check`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import RemoteProtocolError

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

MOST_KEPT = 128
"""Most entries of a row."""
NARROW = 1 << 16
"""A vocabulary up to this size has ids of two bytes on the wire."""
SLACK = 2e-3
"""What float16 may add to a row's mass, or to the log-probability of one entry (relative)."""


@dataclass(frozen=True, slots=True)
class Places:
    """The tokens to be predicted in n texts: `tokens` (places,), text i's from `starts[i]` on to
    `starts[i + 1]`; so `starts` is (n + 1,)."""

    tokens: I32
    starts: I64

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> "Places":
        """The places of token rows of which the tokens from `starts[i]` on are to be predicted."""
        rows = [row[start:] for row, start in zip(ids, starts, strict=True)]
        ends = np.cumsum([0, *map(len, rows)])
        return cls(np.array([t for row in rows for t in row], np.int32), ends.astype(np.int64))

    @property
    def texts(self) -> int:
        """How many texts."""
        return len(self.starts) - 1

    @property
    def digest(self) -> bytes:
        """32 bytes that only the same tokens of the same texts have."""
        shape = self.starts.astype("<i8").tobytes()
        return hashlib.sha256(shape + self.tokens.astype("<i4").tobytes()).digest()

    def owner(self) -> I64:
        """The text of every place, (places,)."""
        return np.repeat(np.arange(self.texts), np.diff(self.starts))


@dataclass(frozen=True, slots=True)
class LogitTable:
    """A model's rows about `places`.

    Attributes:
        truth: (places,) float32, log-probability of the token that follows.
        ids: (places, k) int32, the k likeliest tokens, likeliest first.
        logps: (places, k) float16, their log-probabilities.
    """

    places: Places
    truth: F32
    ids: I32
    logps: F16

    @property
    def kept(self) -> int:
        """Entries of a row, k."""
        return int(self.ids.shape[1])

    def losses(self) -> F32:
        """Cross-entropy of each text's target in nats, summed over its places, (texts,)."""
        owner = self.places.owner()
        sums = np.bincount(owner, weights=-self.truth.astype(np.float64), minlength=self.texts)
        return sums.astype(np.float32)

    @property
    def texts(self) -> int:
        """How many texts."""
        return self.places.texts


def pack(table: LogitTable, vocabulary: int) -> tuple[bytes, bytes, bytes]:
    """The bytes of truth (float32), ids (uint16, or uint32 of a large vocabulary) and logps
    (float16), all little-endian."""
    wide = "<u2" if vocabulary <= NARROW else "<u4"
    return (
        table.truth.astype("<f4").tobytes(),
        table.ids.astype(wide).tobytes(),
        table.logps.astype("<f2").tobytes(),
    )


def unpack(
    places: Places, kept: int, vocabulary: int, truth: bytes, ids: bytes, logps: bytes
) -> LogitTable:
    """The table that `pack` wrote, checked: lengths before anything is allocated, then values.

    Raises:
        RemoteProtocolError: as `check`, or lengths that do not fit `places` and `kept`.
    """
    n = len(places.tokens)
    if not 1 <= kept <= MOST_KEPT:
        raise RemoteProtocolError(f"{kept} entries a row; allowed are 1 to {MOST_KEPT}")
    width = 2 if vocabulary <= NARROW else 4
    for name, data, size in (
        ("truth", truth, 4 * n),
        ("ids", ids, width * n * kept),
        ("logps", logps, 2 * n * kept),
    ):
        if len(data) != size:
            raise RemoteProtocolError(
                f"{name} has {len(data)} bytes, but {n} places of {kept} entries take {size}"
            )
    table = LogitTable(
        places,
        np.frombuffer(truth, "<f4").astype(np.float32),
        np.frombuffer(ids, f"<u{width}").astype(np.int32).reshape(n, kept),
        np.frombuffer(logps, "<f2").astype(np.float16).reshape(n, kept),
    )
    check(table, vocabulary)
    return table


def check(table: LogitTable, vocabulary: int) -> None:
    """Refuse a table that no model of `vocabulary` tokens can have given.

    Raises:
        RemoteProtocolError: an id outside the vocabulary or twice in a row, a number that is not
            finite, a log-probability above 0, a row out of order or of more than all mass, or a
            log-probability of the truth at odds with its row.
    """
    if table.ids.size and not 0 <= table.ids.min() <= table.ids.max() < vocabulary:
        wrong = int(table.ids.max() if table.ids.max() >= vocabulary else table.ids.min())
        raise RemoteProtocolError(f"token id {wrong} is outside the vocabulary of {vocabulary}")
    logps = table.logps.astype(np.float32)
    if not (np.isfinite(logps).all() and np.isfinite(table.truth).all()):
        raise RemoteProtocolError("a log-probability is not finite")
    if (logps > 0).any() or (table.truth > 0).any():
        raise RemoteProtocolError("a log-probability is above 0")
    if (np.diff(logps, axis=1) > 0).any():
        raise RemoteProtocolError("a row is not in falling order")
    if (np.diff(np.sort(table.ids, axis=1), axis=1) == 0).any():
        raise RemoteProtocolError("a row names a token twice")
    mass = np.exp(logps).sum(axis=1)
    if (mass > 1 + SLACK).any():
        raise RemoteProtocolError(f"a row holds the mass {float(mass.max()):.4g}, above 1")
    _check_truth(table, logps)


def _check_truth(table: LogitTable, logps: F32) -> None:
    same = table.ids == table.places.tokens[:, None]  # (places, k)
    among = same.any(axis=1)
    said = np.where(among, (logps * same).sum(axis=1), logps[:, -1])
    slack = SLACK * (1 - said)
    off = np.where(among, np.abs(table.truth - said), table.truth - said)
    if (off > slack).any():
        raise RemoteProtocolError("the loss claimed for a text is not that of its rows")
