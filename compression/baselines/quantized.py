"""Every value in a few bits: int8, int4, NF4 (as NVIDIA FLARE offers), QSGD and the sign.

Knows numpy and the range coder. Does not know tensors' shapes.
"""

from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from compression import entropy
from compression.baselines.method import F32


@dataclass(frozen=True)
class Int8:
    """Linear 8-bit codes with one float32 scale a block of 4096.

    Source: block-wise quantization of NVIDIA FLARE's message filters (bitsandbytes' block size);
    its 8-bit map is not linear, which changes the error little and the bytes not at all.
    """

    block: int = 4096
    name: str = "int8"
    feedback: bool = True

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """One byte a value, four bytes a block."""
        rows, scale = _scaled(values, self.block)
        codes = np.rint(rows * 127).astype(np.int8).reshape(-1)[: values.size]
        return scale.tobytes() + codes.tobytes()

    def decode(self, data: bytes, size: int) -> F32:
        """As `Baseline.decode`."""
        blocks = -(-size // self.block)
        scale = np.frombuffer(data[: 4 * blocks], "<f4")
        codes = np.frombuffer(data[4 * blocks :], np.int8).astype(np.float32)
        return np.asarray(codes / 127 * np.repeat(scale, self.block)[:size], np.float32)


@dataclass(frozen=True)
class FourBit:
    """Sixteen levels with one float32 scale a block of 64: `nf4` or evenly spaced `int4`.

    Source: QLoRA, arXiv 2305.14314, section 3 (NormalFloat); bitsandbytes' block size, as NVIDIA
    FLARE's filters use it.
    """

    name: str = "nf4"
    block: int = 64
    feedback: bool = True

    @property
    def levels(self) -> F32:
        """The sixteen values, ascending, in [-1, 1]."""
        return normal_float_levels() if self.name == "nf4" else np.linspace(-1, 1, 16, dtype="f4")

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """Half a byte a value, four bytes a block."""
        rows, scale = _scaled(values, self.block)
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        codes = np.searchsorted(middles, rows.reshape(-1)).astype(np.uint8)  # (blocks * block,)
        return scale.tobytes() + (codes[0::2] | codes[1::2] << 4).tobytes()

    def decode(self, data: bytes, size: int) -> F32:
        """As `Baseline.decode`."""
        blocks = -(-size // self.block)
        scale = np.frombuffer(data[: 4 * blocks], "<f4")
        pairs = np.frombuffer(data[4 * blocks :], np.uint8)
        codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(blocks, self.block)
        return np.asarray((self.levels[codes] * scale[:, None]).reshape(-1)[:size], np.float32)


@dataclass(frozen=True)
class Qsgd:
    """Unbiased random rounding to `levels` steps of a bucket's norm, entropy coded.

    Source: QSGD, arXiv 1610.02132, section 3.1; a range coder in place of Elias codes.
    """

    levels: int = 1
    bucket: int = 512
    feedback: bool = False
    name: str = field(default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or f"qsgd {self.levels}")

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """Two bytes a bucket for its norm, then the range code of all symbols."""
        rows = _blocks(values, self.bucket)
        norm = np.linalg.norm(rows, axis=1).astype(np.float16).astype(np.float32)
        exact = np.abs(rows) / np.maximum(norm, 1e-30)[:, None] * self.levels
        low = np.floor(exact)
        steps = low + (rng.random(rows.shape) < exact - low)
        symbols = np.clip(np.sign(rows) * steps, -entropy.MAX_MAGNITUDE, entropy.MAX_MAGNITUDE)
        flat = symbols.astype(np.int32).reshape(-1)[: values.size]
        model = entropy.ClassModel.of(flat)
        top = max(1, int(np.abs(flat).max(initial=0)))
        head = np.array([top], "<u2").tobytes() + bytes([model.nonzero, model.fall])
        norms: bytes = norm.astype("<f2").tobytes()
        return head + norms + entropy.encode([flat], [model], top)

    def decode(self, data: bytes, size: int) -> F32:
        """As `Baseline.decode`."""
        buckets = -(-size // self.bucket)
        top, model = int(np.frombuffer(data[:2], "<u2")[0]), entropy.ClassModel(data[2], data[3])
        norm = np.frombuffer(data[4 : 4 + 2 * buckets], "<f2").astype(np.float32)
        (symbols,) = entropy.decode(data[4 + 2 * buckets :], [size], [model], top)
        scale = np.repeat(norm, self.bucket)[:size]
        return np.asarray(symbols * scale / self.levels, np.float32)


@dataclass(frozen=True)
class Sign:
    """One bit a value, and the mean magnitude of each block of 4096.

    Source: EF-SignSGD, arXiv 1901.09847, algorithm 1.
    """

    block: int = 4096
    name: str = "sign"
    feedback: bool = True

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """One bit a value, four bytes a block."""
        blocks = -(-values.size // self.block)
        edges = np.arange(blocks) * self.block
        total = np.add.reduceat(np.abs(values), edges)
        count = np.diff(np.append(edges, values.size))
        scale: F32 = (total / count).astype("<f4")
        return scale.tobytes() + np.packbits(values >= 0).tobytes()

    def decode(self, data: bytes, size: int) -> F32:
        """As `Baseline.decode`."""
        blocks = -(-size // self.block)
        scale = np.frombuffer(data[: 4 * blocks], "<f4")
        bits = np.unpackbits(np.frombuffer(data[4 * blocks :], np.uint8), count=size)
        signs = bits.astype(np.float32) * 2 - 1
        return np.asarray(signs * np.repeat(scale, self.block)[:size], np.float32)


def normal_float_levels() -> F32:
    """NF4's sixteen values: quantiles of a normal distribution, zero among them, within [-1, 1].

    Source: QLoRA, arXiv 2305.14314, section 3 and appendix E.
    """
    quantile = NormalDist().inv_cdf
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2  # outermost probability: between those of 15 and 16
    upper = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    lower = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort(np.array([*upper, 0.0, *lower]))
    return np.asarray(levels / levels.max(), np.float32)


def _blocks(values: F32, block: int) -> F32:
    padded = np.zeros(-(-values.size // block) * block, np.float32)
    padded[: values.size] = values
    return padded.reshape(-1, block)


def _scaled(values: F32, block: int) -> tuple[F32, npt.NDArray[np.float32]]:
    """Values as rows in [-1, 1], and each row's scale."""
    rows = _blocks(values, block)
    scale = np.abs(rows).max(axis=1).astype("<f4")
    return np.asarray(rows / np.maximum(scale, 1e-30)[:, None], np.float32), scale
