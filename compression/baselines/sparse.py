"""A few numbers for many: the largest values, a shared random projection, a count sketch.

Knows numpy and seeds. Does not know tensors' shapes.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from compression.baselines.method import F32, pack_mask, unpack_mask


@dataclass(frozen=True)
class TopK:
    """The largest `share` of the values in float16; their places at the entropy of the mask.

    Source: Stich et al. 2018, arXiv 1809.07599, section 1.2.
    """

    share: float
    feedback: bool = True
    name: str = field(default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or f"top-k {self.share:.2%}")

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """The mask, then two bytes a kept value."""
        mask = largest(values, max(1, round(self.share * values.size)))
        return pack_mask(mask) + values[mask].astype("<f2").tobytes()

    def decode(self, data: bytes, size: int) -> F32:
        """As `Baseline.decode`."""
        mask, rest = unpack_mask(data, size)
        values = np.zeros(size, np.float32)
        values[mask] = np.frombuffer(rest, "<f2")
        return values


@dataclass(frozen=True)
class RandomProjection:
    """`share` of the coordinates after a rotation that both sides draw from `seed`; float16.

    The rotation is random signs and a Walsh-Hadamard transform, so the projection is orthogonal
    and its decoder the transpose. A new subset is drawn from the first bytes each time, so that
    error feedback reaches every direction.

    Source: subsampled randomized Hadamard transform, Ailon and Chazelle 2009; Konečný et al. 2016,
    arXiv 1610.05492, section 3 (structured random rotations, subsampling).
    """

    share: float
    seed: int = 0
    feedback: bool = True
    name: str = field(default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or f"random projection {self.share:.2%}")

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """Four bytes of draw, then two bytes a coordinate."""
        draw = int(rng.integers(2**32))
        signs, chosen = self._plan(values.size, draw)
        padded = np.zeros(len(signs), np.float32)
        padded[: values.size] = values
        rotated = hadamard(padded * signs)
        return np.array([draw], "<u4").tobytes() + rotated[chosen].astype("<f2").tobytes()

    def decode(self, data: bytes, size: int) -> F32:
        """As `Baseline.decode`."""
        signs, chosen = self._plan(size, int(np.frombuffer(data[:4], "<u4")[0]))
        rotated = np.zeros(len(signs), np.float32)
        rotated[chosen] = np.frombuffer(data[4:], "<f2")
        return np.asarray((hadamard(rotated) * signs)[:size], np.float32)

    def _plan(self, size: int, draw: int) -> tuple[F32, npt.NDArray[np.int64]]:
        padded = 1 << max(0, (size - 1).bit_length())
        rng = np.random.default_rng([self.seed, draw])
        signs = rng.integers(0, 2, padded).astype(np.float32) * 2 - 1
        return signs, rng.choice(padded, max(1, round(self.share * size)), replace=False)


@dataclass(frozen=True)
class CountSketch:
    """`rows` hash tables of float16 sums; the heaviest values are read back by their median.

    Sketches of devices add up; here each is read back alone, and error feedback is the device's.
    That needs an error smaller than the update, which a full sketch does not give; so the device,
    which can read its own sketch, also sends the scale that fits best.

    Source: FetchSGD, arXiv 2007.07682, section 3 and algorithm 1.
    """

    share: float
    rows: int = 5
    kept: float = 0.1
    seed: int = 0
    feedback: bool = True
    name: str = field(default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or f"count sketch {self.share:.2%}")

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """Four bytes of scale and two a cell; `share` is cells over values."""
        columns, signs, width = self._hashes(values.size)
        cells = [
            np.bincount(column, values * sign, minlength=width)
            for column, sign in zip(columns, signs, strict=True)
        ]
        body = np.stack(cells).astype("<f2").tobytes()
        read = self._read(body, values.size)
        scale = float(read @ values) / max(float(read @ read), 1e-30)
        return np.array([scale], "<f4").tobytes() + body

    def decode(self, data: bytes, size: int) -> F32:
        """As `Baseline.decode`: of all estimates the heaviest, `kept` times the cells in number."""
        scale = np.frombuffer(data[:4], "<f4")[0]
        return np.asarray(self._read(data[4:], size) * scale, np.float32)

    def _read(self, body: bytes, size: int) -> F32:
        columns, signs, width = self._hashes(size)
        cells = np.frombuffer(body, "<f2").astype(np.float32).reshape(self.rows, width)
        read = np.stack([cells[r][columns[r]] * signs[r] for r in range(self.rows)])
        estimate = np.median(read, axis=0).astype(np.float32)
        mask = largest(estimate, max(1, round(self.kept * cells.size)))
        return np.where(mask, estimate, np.float32(0))

    def _hashes(self, size: int) -> tuple[npt.NDArray[np.int64], F32, int]:
        width = max(1, round(self.share * size / self.rows))
        rng = np.random.default_rng([self.seed, size])
        columns = rng.integers(0, width, (self.rows, size))
        signs = rng.integers(0, 2, (self.rows, size)).astype(np.float32) * 2 - 1
        return columns, signs, width


def largest(values: F32, count: int) -> npt.NDArray[np.bool_]:
    """Mask (size,) of the `count` values of largest magnitude."""
    mask = np.zeros(values.size, bool)
    mask[np.argpartition(-np.abs(values), min(count, values.size) - 1)[:count]] = True
    return mask


def hadamard(values: F32) -> F32:
    """The orthonormal Walsh-Hadamard transform of 2^m values; it is its own inverse."""
    x, half = values.astype(np.float32), 1
    while half < x.size:
        pairs = x.reshape(-1, 2, half)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        half *= 2
    return np.asarray(x / np.sqrt(np.float32(values.size)), np.float32)
