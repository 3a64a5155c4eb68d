"""What every baseline offers, and the entropy coding that several of them share."""

from typing import Protocol

import constriction
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


class Baseline(Protocol):
    """A way to send `size` float32 values; lossy, stateless but for warm starts.

    Attributes:
        name: as the tables show it.
        feedback: whether error feedback helps it. False for methods that are unbiased by design
            or whose error is not the sender's to know.
    """

    name: str
    feedback: bool

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """The bytes that stand for `values` (size,)."""

    def decode(self, data: bytes, size: int) -> F32:
        """The values that `data` stands for, (size,)."""


def pack_mask(mask: npt.NDArray[np.bool_]) -> bytes:
    """A sparse mask at its entropy: its count (4 bytes), then a range code."""
    count = int(mask.sum())
    coder = constriction.stream.queue.RangeEncoder()
    if 0 < count < mask.size:
        coder.encode(mask.astype(np.int32), _bernoulli(count, mask.size))
    words = np.asarray(coder.get_compressed(), dtype="<u4")
    return np.array([count, len(words)], "<u4").tobytes() + words.tobytes()


def unpack_mask(data: bytes, size: int) -> tuple[npt.NDArray[np.bool_], bytes]:
    """The mask (size,) that `pack_mask` wrote, and what follows it."""
    count, words = (int(n) for n in np.frombuffer(data[:8], "<u4"))
    body = np.frombuffer(data[8 : 8 + 4 * words], "<u4").astype(np.uint32)
    rest = data[8 + 4 * words :]
    if count in (0, size):
        return np.full(size, count > 0), rest
    coder = constriction.stream.queue.RangeDecoder(body)
    return np.asarray(coder.decode(_bernoulli(count, size), size)).astype(bool), rest


def _bernoulli(count: int, size: int) -> constriction.stream.model.Bernoulli:
    return constriction.stream.model.Bernoulli(count / size, perfect=False)
