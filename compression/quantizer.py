"""The dead-zone quantizer and its rate and distortion at any step. Knows numpy and entropy models.

Values are measured in units of their kind's RMS. A value below the threshold becomes zero; above
it, one more unit per `step`. The decoder learns one reconstruction offset for magnitude 1 and one
for the rest (centroids), so it needs no threshold.

Work goes piece by piece, each small enough for a cache, and past the threshold only over what is
left: at the rates of this codec most symbols are zero.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compression.entropy import MAX_MAGNITUDE, ClassModel, estimate_bits

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I16 = npt.NDArray[np.int16]

STEP_RANGE = (2.0**-8, 2.0**6)
"""Steps worth trying, in RMS: finer is below float16's error, coarser leaves nothing over."""

_OCTAVES = (-10, 12)  # of |value| / RMS that the spectrum tells apart; below, all are zero
_PER_OCTAVE = 256  # so a threshold is off by at most 0.2 %; the rate is steep in it
_FIRST = (127 + _OCTAVES[0]) * _PER_OCTAVE  # a float32's top bits without the sign, at 2^-10
_BINS = (_OCTAVES[1] - _OCTAVES[0]) * _PER_OCTAVE
_OFFSET_UNIT = 170  # an offset byte b means b / 170 - 1/2, which covers -1/2 .. 1


def threshold(step: float) -> float:
    """Where zero ends, in steps: 1/2 (plain rounding) for fine steps, a full step from 2.5 RMS on.

    At low rates the bits of a small value buy more squared error elsewhere, so the best dead zone
    widens (Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian variables").
    """
    return min(0.5 + 0.2 * step, 1.0)


@dataclass(frozen=True, slots=True)
class Quantized:
    """One class of values on the grid.

    Attributes:
        symbols: (n,), |q| at most MAX_MAGNITUDE.
        count, magnitude, top: how many are not zero, the sum and the largest of their magnitudes.
        excess, ones: how far, in steps, values lay over their magnitude in sum, and how many did,
            (2,) each: of magnitude 1, and of more.
    """

    symbols: I16
    count: int
    magnitude: int
    top: int
    excess: F64
    ones: F64

    @property
    def model(self) -> ClassModel:
        """That suits the symbols."""
        return ClassModel.fitted(self.symbols.size, self.count, self.magnitude)


def quantize(pieces: Iterable[F32], size: int, step: float, unit: float) -> Quantized:
    """The symbols of `size` values in pieces; `unit` is what 1.0 RMS is in them."""
    symbols = np.zeros(size, np.int16)
    count = magnitude = top = start = 0
    excess, ones = np.zeros(2), np.zeros(2)
    inverse = np.float32(1.0 / (step * unit)) if unit > 0 else np.float32(0.0)
    for values in pieces:
        scaled = np.abs(values)
        scaled *= inverse
        where = np.flatnonzero(scaled >= np.float32(threshold(step)))
        over = scaled[where]
        whole = np.minimum(over + np.float32(1.0 - threshold(step)), MAX_MAGNITUDE).astype(np.int16)
        np.maximum(whole, 1, out=whole)
        symbols[where + start] = np.where(values[where] < 0, -whole, whole)
        start += values.size
        if where.size:
            count, magnitude = count + where.size, magnitude + int(whole.sum(dtype=np.int64))
            top = max(top, int(whole.max()))
            group = whole > 1
            excess += np.bincount(group, over - whole, minlength=2)
            ones += np.bincount(group, minlength=2)
    return Quantized(symbols, count, magnitude, top, excess, ones)


def centroids(classes: Sequence[Quantized]) -> tuple[int, int]:
    """The two offset bytes that make reconstructed magnitudes their group's mean."""
    excess, ones = sum(c.excess for c in classes), sum(c.ones for c in classes)
    offset = np.asarray(excess) / np.maximum(ones, 1)
    codes = np.clip(np.rint((offset + 0.5) * _OFFSET_UNIT), 0, 255).astype(int)
    return int(codes[0]), int(codes[1])


def values_of(
    symbols: npt.NDArray[np.integer], step: float, unit: float, offsets: tuple[int, int], top: int
) -> F32:
    """Values of symbols, |q| at most `top`; float32, same shape."""
    table = np.arange(top + 1, dtype=np.float32)
    table[1:2] += np.float32(offsets[0] / _OFFSET_UNIT - 0.5)
    table[2:] += np.float32(offsets[1] / _OFFSET_UNIT - 0.5)
    table *= np.float32(step)
    table *= np.float32(unit)
    signed = np.concatenate([-table[:0:-1], table])
    result: F32 = signed[symbols + top]
    return result


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a step would cost and give: bits of the codes, cosine of the decoded update."""

    bits: float
    cosine: float


class Spectrum:
    """How many values of each class have which size; answers for every step without coding.

    `counts` (classes, bins) come from `histogram`, `units` (classes,) are what 1.0 RMS of a class
    is in the update itself, `total` is the squared norm of the whole update.
    """

    def __init__(self, counts: Sequence[F64], sizes: Sequence[int], units: F64, total: float):
        stacked = np.stack(counts)
        bins = np.flatnonzero(stacked.any(axis=0))
        used = slice(int(bins[0]), int(bins[-1]) + 1) if bins.size else slice(0, 1)
        self._count = np.ascontiguousarray(stacked[:, used])
        self._size = np.asarray(sizes, np.float64)
        self._energy, self._total = np.square(units), total
        octave, within = np.divmod(np.arange(_BINS)[used], _PER_OCTAVE)
        center = np.ldexp(1.0 + (within + 0.5) / _PER_OCTAVE, (octave + _OCTAVES[0]).astype(int))
        self._center: F64 = center  # (bins,), ascending

    def bits(self, step: float) -> float:
        """Of the codes at this step (in RMS)."""
        count, magnitude, _ = self._over(step)
        return estimate_bits(self._size, count.sum(axis=1), count @ magnitude)

    def at(self, step: float) -> Outlook:
        """The outlook for this step (in RMS)."""
        count, magnitude, center = self._over(step)
        group = (magnitude > 1).astype(np.intp)
        excess = np.bincount(group, (center / step - magnitude) * count.sum(axis=0), minlength=2)
        weight = np.bincount(group, count.sum(axis=0), minlength=2)
        value = (magnitude + (excess / np.maximum(weight, 1))[group]) * step
        dot = float(self._energy @ (count @ (center * value)))
        norm = float(self._energy @ (count @ value**2))
        cosine = dot / math.sqrt(norm * self._total) if norm > 0 and self._total > 0 else 0.0
        bits = estimate_bits(self._size, count.sum(axis=1), count @ magnitude)
        return Outlook(bits, cosine)

    def step_for(self, bits: float) -> float:
        """The finest step whose codes take at most `bits`, by bisection."""
        low, high = (math.log2(step) for step in STEP_RANGE)
        for _ in range(16):  # 14 octaves / 2^16: steps are found to 0.02 %
            middle = (low + high) / 2
            low, high = (low, middle) if self.bits(2.0**middle) <= bits else (middle, high)
        return float(2.0**high)

    def _over(self, step: float) -> tuple[F64, F64, F64]:
        """Counts, magnitudes and centers of the bins that do not become zero."""
        first = int(np.searchsorted(self._center, threshold(step) * step))
        center = self._center[first:]
        magnitude = np.floor(center / step + 1.0 - threshold(step))
        return self._count[:, first:], np.clip(magnitude, 1.0, MAX_MAGNITUDE), center


def histogram(pieces: Iterable[F32], unit: float) -> F64:
    """How many values have which size (bins,); `unit` is what 1.0 RMS is in them."""
    counts = np.zeros(_BINS)
    inverse = np.float32(1.0 / unit) if unit > 0 else np.float32(0.0)
    for values in pieces:
        # Exponent and eight mantissa bits of a float32 are its logarithm in 1/256 octaves, free.
        top = np.abs(values)
        top *= inverse
        places = (top.view(np.uint32) >> np.uint32(15)).astype(np.intp)
        places -= _FIRST
        np.clip(places, 0, _BINS - 1, out=places)
        counts += np.bincount(places, minlength=_BINS)
    return counts
