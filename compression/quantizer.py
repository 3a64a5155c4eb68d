"""The dead-zone quantizer and its rate and distortion at any step. Knows numpy and entropy models.

Values are measured in units of their kind's RMS. A value below the threshold becomes zero; above
it, one more unit per `step`. The decoder learns one reconstruction offset for magnitude 1 and one
for the rest (centroids), so it needs no threshold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compression.entropy import I32, MAX_MAGNITUDE, estimate_bits

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

STEP_RANGE = (2.0**-8, 2.0**6)
"""Steps worth trying, in RMS: finer is below float16's error, coarser leaves nothing over."""

_OCTAVES = (-12, 12)  # of |value| / RMS that the spectrum tells apart
_PER_OCTAVE = 256  # so a threshold is off by at most 0.2 %; the rate is steep in it
_FIRST = (127 + _OCTAVES[0]) * _PER_OCTAVE  # a float32's top bits without the sign, at 2^-12
_BINS = (_OCTAVES[1] - _OCTAVES[0]) * _PER_OCTAVE
_OFFSET_UNIT = 170  # an offset byte b means b / 170 - 1/2, which covers -1/2 .. 1


def threshold(step: float) -> float:
    """Where zero ends, in steps: 1/2 (plain rounding) for fine steps, a full step from 2.5 RMS on.

    At low rates the bits of a small value buy more squared error elsewhere, so the best dead zone
    widens (Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian variables").
    """
    return min(0.5 + 0.2 * step, 1.0)


def quantize(values: F32, step: float) -> I32:
    """Integers of `values`, |q| at most MAX_MAGNITUDE, same shape."""
    magnitude = np.abs(values) / np.float32(step)
    magnitude += np.float32(1.0 - threshold(step))
    np.minimum(magnitude, MAX_MAGNITUDE, out=magnitude)
    symbols = magnitude.astype(np.int32)
    np.negative(symbols, out=symbols, where=values < 0)
    return symbols


def dequantize(symbols: I32, step: float, offsets: tuple[int, int]) -> F32:
    """Values of the integers, float32; `offsets` are the two offset bytes."""
    top = int(np.abs(symbols).max(initial=0))
    table = np.arange(top + 1, dtype=np.float32)
    table[1:2] += np.float32(offsets[0] / _OFFSET_UNIT - 0.5)
    table[2:] += np.float32(offsets[1] / _OFFSET_UNIT - 0.5)
    table *= np.float32(step)
    signed = np.concatenate([-table[:0:-1], table])
    result: F32 = signed[symbols + top]
    return result


def centroids(values: Sequence[F32], symbols: Sequence[I32], step: float) -> tuple[int, int]:
    """The two offset bytes that make reconstructed magnitudes their group's mean."""
    excess, count = np.zeros(2), np.zeros(2)
    for value, symbol in zip(values, symbols, strict=True):
        where = np.flatnonzero(symbol)
        magnitude = np.abs(symbol[where])
        group = (magnitude > 1).astype(np.intp)
        rest = np.abs(value[where]).astype(np.float64) / step - magnitude
        excess += np.bincount(group, rest, minlength=2)
        count += np.bincount(group, minlength=2)
    return _offset_bytes(excess / np.maximum(count, 1))


def _offset_bytes(offset: F64) -> tuple[int, int]:
    codes = np.clip(np.rint((offset + 0.5) * _OFFSET_UNIT), 0, 255).astype(int)
    return int(codes[0]), int(codes[1])


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a step would cost and give: bits of the codes, cosine of the decoded update."""

    bits: float
    cosine: float


class Spectrum:
    """How many values of each class have which size; answers for every step without coding.

    `classes` are the normalised values of each class, `energy` what one unit squared of a class is
    worth in the update itself (its squared RMS), `total` the squared norm of the whole update.
    """

    def __init__(self, classes: Sequence[F32], energy: Sequence[float], total: float) -> None:
        self._count = np.stack([_histogram(values) for values in classes])  # (classes, bins)
        self._size = np.array([values.size for values in classes], np.float64)
        self._energy = np.asarray(energy, np.float64)
        self._total = total
        octave, within = np.divmod(np.arange(_BINS), _PER_OCTAVE)
        center = np.ldexp(1.0 + (within + 0.5) / _PER_OCTAVE, (octave + _OCTAVES[0]).astype(int))
        self._center: F64 = center  # (bins,)

    def at(self, step: float) -> Outlook:
        """The outlook for this step (in RMS)."""
        magnitude = np.floor(self._center / step + 1.0 - threshold(step))
        magnitude = np.minimum(magnitude, MAX_MAGNITUDE)
        kept = magnitude > 0
        count = self._count[:, kept]
        size, magnitude, center = self._size, magnitude[kept], self._center[kept]
        bits = estimate_bits(size, count.sum(1), count @ magnitude)
        group = (magnitude > 1).astype(np.intp)
        excess = np.bincount(group, (center / step - magnitude) * count.sum(0), minlength=2)
        weight = np.bincount(group, count.sum(0), minlength=2)
        value = (magnitude + (excess / np.maximum(weight, 1))[group]) * step
        dot = float(self._energy @ (count @ (center * value)))
        norm = float(self._energy @ (count @ value**2))
        cosine = dot / math.sqrt(norm * self._total) if norm > 0 and self._total > 0 else 0.0
        return Outlook(bits, cosine)

    def step_for(self, bits: float) -> float:
        """The finest step whose codes take at most `bits`, by bisection."""
        low, high = (math.log2(step) for step in STEP_RANGE)
        for _ in range(16):  # 14 octaves / 2^16: steps are found to 0.02 %
            middle = (low + high) / 2
            low, high = (low, middle) if self.at(2.0**middle).bits <= bits else (middle, high)
        return float(2.0**high)


def _histogram(values: F32) -> npt.NDArray[Any]:
    # Exponent and eight mantissa bits of a float32 are its logarithm in 1/256 octaves, for free.
    top = (np.abs(values).view(np.uint32) >> np.uint32(15)).astype(np.int32)
    top -= _FIRST
    np.clip(top, 0, _BINS - 1, out=top)
    return np.bincount(top.reshape(-1), minlength=_BINS).astype(np.float64)
