"""Range coding of sparse integers with two-byte models. Knows constriction; knows no transform.

Symbols come in classes that should behave alike. Each class has a model of two parameters: how
often a symbol is not zero (steps of 1/16 octave) and how fast magnitudes fall (a geometric law).
Two bytes describe it, so the model adapts to every update and still costs next to nothing. The
probabilities are built from constants by multiplication alone, hence are the same on every machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from compression.errors import CodecError

I32 = npt.NDArray[np.int32]

MAX_MAGNITUDE = 2047
"""Largest |symbol|; larger latents are clipped and the rest is left to error feedback."""

SILENT = 255
"""The nonzero code of a class whose symbols are all zero: nothing is coded for it."""

_AT_ONCE = 1 << 15

# 2^(-j/16), written out because the last bit of a library's exp2 may differ between machines.
_SIXTEENTHS = (
    1.0, 0.9576032806985737, 0.9170040432046712, 0.8781260801866497,
    0.8408964152537145, 0.8052451659746271, 0.7711054127039704, 0.7384130729697497,
    0.7071067811865476, 0.6771277734684463, 0.6484197773255048, 0.6209289060367420,
    0.5946035575013605, 0.5693943173783458, 0.5452538663326288, 0.5221368912137069,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClassModel:
    """How one class of symbols is distributed: P(not zero) = 2^(-nonzero/16), ratio = fall/256."""

    nonzero: int
    fall: int

    @classmethod
    def of(cls, symbols: I32) -> "ClassModel":
        """The model that suits these symbols."""
        return cls.fitted(symbols.size, int(np.count_nonzero(symbols)), int(np.abs(symbols).sum()))

    @classmethod
    def fitted(cls, size: int, count: int, magnitude: int) -> "ClassModel":
        """The model for `count` nonzero of `size` symbols whose magnitudes sum to `magnitude`."""
        if count == 0:
            return cls(SILENT, 0)
        nonzero = round(-16 * math.log2(count / size))
        fall = round(256 * (1 - count / magnitude))
        return cls(min(max(nonzero, 1), SILENT - 1), min(max(fall, magnitude > count), 255))

    def probabilities(self, top: int) -> npt.NDArray[np.float32]:
        """Probabilities of the symbols -top..top, (2 top + 1,)."""
        share = math.ldexp(_SIXTEENTHS[self.nonzero % 16], -(self.nonzero // 16))
        tail = np.cumprod(np.r_[1.0, np.full(top - 1, self.fall / 256)])  # (top,)
        tail *= 0.5 * share / tail.sum()
        law: npt.NDArray[np.float32] = np.r_[tail[::-1], 1.0 - share, tail].astype(np.float32)
        return law


def estimate_bits(
    size: npt.NDArray[Any], count: npt.NDArray[Any], magnitude: npt.NDArray[Any]
) -> float:
    """Bits that classes of `size` symbols, `count` of them nonzero, take; arrays (classes,).

    As `ClassModel.fitted` will code them, its rounding included.
    """
    some = count > 0
    size, count = size[some], count[some].astype(np.float64)
    magnitude = np.maximum(magnitude[some], count)
    nonzero = np.clip(np.rint(-16 * np.log2(count / size)), 1, SILENT - 1) / 16
    more = magnitude - count
    fall = np.clip(np.rint(256 * more / magnitude), more > 0, 255) / 256
    zeros = (size - count) * -np.log2(1.0 - np.exp2(-nonzero))
    signs_and_ones = count * (nonzero + 1.0 - np.log2(1.0 - fall))
    return float((zeros + signs_and_ones - more * np.log2(np.maximum(fall, 1e-9))).sum())


def encode(
    classes: Sequence[npt.NDArray[np.integer]], models: Sequence[ClassModel], top: int
) -> bytes:
    """Range-code the symbols of every class in order; whole 32-bit little-endian words."""
    coder = constriction.stream.queue.RangeEncoder()
    for symbols, model in zip(classes, models, strict=True):
        if model.nonzero == SILENT:
            continue
        law = _categorical(model, top)
        for start in range(0, symbols.size, _AT_ONCE):  # the coder wants 32 bits a symbol
            part = symbols[start : start + _AT_ONCE].astype(np.int32)
            part += top
            coder.encode(part, law)
    words = np.asarray(coder.get_compressed(), dtype=np.dtype("<u4"))
    return words.tobytes()


def decode(data: bytes, sizes: list[int], models: list[ClassModel], top: int) -> list[I32]:
    """Return what `encode` was given.

    Raises:
        CodecError: the bytes are no code for these models.
    """
    if len(data) % 4:
        raise CodecError(f"{len(data)} bytes are no whole words of a range code")
    words = np.frombuffer(data, dtype=np.dtype("<u4")).astype(np.uint32)
    coder = constriction.stream.queue.RangeDecoder(words)
    classes = []
    for size, model in zip(sizes, models, strict=True):
        if model.nonzero == SILENT or size == 0:
            classes.append(np.zeros(size, np.int32))
            continue
        try:
            symbols = coder.decode(_categorical(model, top), size)
        except Exception as exc:  # constriction documents no narrower type for foreign data
            raise CodecError("the codes are no range code for their own models") from exc
        classes.append(np.asarray(symbols, np.int32) - np.int32(top))
    if not coder.maybe_exhausted():
        raise CodecError("bytes are left over after the last code")
    return classes


def _categorical(model: ClassModel, top: int) -> Any:
    return constriction.stream.model.Categorical(model.probabilities(top), perfect=False)
