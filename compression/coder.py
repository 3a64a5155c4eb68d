"""Codes blocks within a byte target and decodes them: the way through transform, quantizer, coder.

Knows bases, quantizers and headers. Does not know tensors, files or error feedback.

Encoding, step by step (v is the update plus what error feedback owes, in blocks):
1. a moving basis takes the trend out, a few numbers; the rest becomes latents z: by the moving
   basis, by the learned encoder (numpy, or its ONNX graph), or as it is
2. each kind of factor (or all, for a moving basis) has its RMS as its unit
3. choose the step for the byte target, quantize with a dead zone, range-code class by class
4. decode our own bytes, measure the cosine; a result below the plain dead-zone quantizer's at equal
   bytes is thrown away for that (the gate; the header's method says so)

Beside v and what is returned, one array of v's size and one of half its bytes are made.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compression import entropy, quantizer
from compression.basis import Basis
from compression.blocks import F32, Layout
from compression.errors import CodecError
from compression.header import Header, Method, bfloat16, header_bytes
from compression.moving import MovingBasis
from compression.transforms import (
    F16,
    EncoderSession,
    Group,
    Plain,
    length,
    pieces,
    transforms,
)

GATE_MARGIN = 0.998
"""A cosine may be this little below the plain quantizer's, which is an estimate."""

Symbols = Sequence[npt.NDArray[np.integer]]


@dataclass(frozen=True, slots=True)
class Draft:
    """Codes, and the blocks (rows, block) that they stand for with their cosine."""

    data: bytes
    method: Method
    sent: F32
    cosine: float


class Coder:
    """The coding half of a `Compressor`; `codec` is the four-byte id that headers carry."""

    def __init__(self, layout: Layout, basis: Basis | MovingBasis | None, codec: bytes) -> None:
        self._layout, self._codec = layout, codec
        self._ways = transforms(layout, basis)

    def encode(
        self, wanted: F32, bytes_target: int, session: EncoderSession | None = None
    ) -> Draft:
        """Code blocks (rows, block) in `bytes_target` bytes, or in the least that is possible."""
        plain, *better = self._ways
        floor = self._plan(plain, wanted, session)
        step, spare = floor.step_for(bytes_target), None
        for method in better:
            plan = self._plan(method, wanted, session)
            best = plan.step_for(bytes_target)
            draft = self._within(plan, best, wanted, bytes_target, plan.flat)
            least = floor.spectrum.at(step).cosine * GATE_MARGIN
            if draft.cosine >= least and len(draft.data) <= bytes_target:  # step 4
                return draft
            spare = draft.sent.reshape(-1)
        return self._within(floor, step, wanted, bytes_target, spare)

    def _plan(self, method: Method, wanted: F32, session: EncoderSession | None) -> "_Plan":
        way = self._ways[method]
        trend, latents = way.latents(wanted, session)  # step 1
        energy = [_dot(latents[rows], latents[rows]) for rows in way.spans]
        sizes = [(rows.stop - rows.start) * self._layout.block for rows in way.spans]
        rms = tuple(_rms(e / n) for e, n in zip(energy, sizes, strict=True))  # step 2
        flat, units = latents.reshape(-1), _units(rms, way)
        counts = [
            quantizer.histogram(_values(flat, group), unit)
            for group, unit in zip(way.classes, units, strict=True)
        ]
        lengths = [length(group) for group in way.classes]
        spectrum = quantizer.Spectrum(counts, lengths, np.array(units), sum(energy))
        # the last word is the range coder's
        overhead = header_bytes(len(rms)) + 2 * trend.size + 2 * len(way.classes) + 4
        return _Plan(method, trend, rms, flat, spectrum, overhead)

    def _within(
        self, plan: "_Plan", step: float, wanted: F32, target: int, spare: F32 | None
    ) -> Draft:
        # The spectrum's bits are an estimate; the true length counts, so coarsen until it fits.
        header, data, symbols = self._quantized(plan, step)
        while len(data) > target and step < quantizer.STEP_RANGE[1]:
            step, symbols = 1.005 * step, []
            header, data, symbols = self._quantized(plan, step)
        sent = self._synthesise(header, plan.trend, symbols, spare)
        return Draft(data, plan.method, sent, _cosine(wanted, sent))

    def _quantized(self, plan: "_Plan", step: float) -> tuple[Header, bytes, Symbols]:
        way, step = self._ways[plan.method], float(np.float16(step))
        classes = [
            quantizer.quantize(_values(plan.flat, group), length(group), step, unit)
            for group, unit in zip(way.classes, _units(plan.rms, way), strict=True)
        ]  # step 3
        top, models = max(1, *(c.top for c in classes)), [c.model for c in classes]
        symbols = [c.symbols for c in classes]
        header = Header(
            plan.method, self._codec, self._layout.hash[:4], plan.rms, step,
            quantizer.centroids(classes), top,
        )  # fmt: skip
        body = plan.trend.astype("<f2").tobytes()
        body += bytes(code for model in models for code in (model.nonzero, model.fall))
        body += entropy.encode(symbols, models, top)
        return header, header.encode(body), symbols

    def decode(self, header: Header, body: bytes) -> F32:
        """Blocks (rows, block) of a header and its body.

        Raises:
            CodecError: the body is no code for this layout, or stands for non-finite values.
        """
        way = self._ways[header.method]
        first = 2 * way.trends
        start = first + 2 * len(way.classes)
        if len(header.rms) != len(way.spans) or len(body) < start or header.top < 1:
            raise CodecError("the codes are too short for their models")
        trend = np.frombuffer(body[:first], "<f2")
        pairs = zip(body[first:start:2], body[first + 1 : start : 2], strict=True)
        models = [entropy.ClassModel(*pair) for pair in pairs]
        sizes = [length(group) for group in way.classes]
        symbols = entropy.decode(body[start:], sizes, models, header.top)
        with np.errstate(over="ignore", invalid="ignore"):  # forged scales; refused below
            blocks = self._synthesise(header, trend, symbols)
        if not np.isfinite(blocks).all():
            raise CodecError("the codes stand for values that are not finite")
        return blocks

    def _synthesise(
        self, header: Header, trend: F16, symbols: Symbols, spare: F32 | None = None
    ) -> F32:
        """The blocks that symbols stand for; `spare` is memory for their latents."""
        way = self._ways[header.method]
        z = np.empty(self._layout.rows * way.width, np.float32) if spare is None else spare
        z.fill(0.0)  # most symbols are; padding may have none
        for group, part, unit in zip(way.classes, symbols, _units(header.rms, way), strict=True):
            for piece, here in zip(pieces(group), pieces(slice(0, part.size)), strict=True):
                where = np.flatnonzero(part[here])
                values = quantizer.values_of(
                    part[here][where], header.step, unit, header.offsets, header.top
                )
                if isinstance(piece, slice):
                    z[piece][where] = values
                else:
                    z[piece[where]] = values
        blocks = way.blocks(trend, z.reshape(-1, way.width))
        self._layout.clear_padding(blocks)
        return blocks


@dataclass(frozen=True, slots=True)
class _Plan:
    method: Method
    trend: F16  # (k,)
    rms: tuple[float, ...]
    flat: F32  # latents, (rows * width,)
    spectrum: quantizer.Spectrum
    overhead: int

    def step_for(self, size: float) -> float:
        return self.spectrum.step_for(8.0 * max(size - self.overhead, 0.0))


def _values(flat: F32, group: Group) -> Iterator[F32]:
    return (flat[piece] for piece in pieces(group))


def _units(rms: Sequence[float], way: Plain) -> list[float]:
    """The RMS that each class is measured in."""
    return [scale for scale in rms for _ in range(len(way.classes) // len(rms))]


def _rms(mean_square: float) -> float:
    rms = math.sqrt(mean_square)
    if not math.isfinite(rms) or rms > 1e30:
        raise CodecError(f"an update of RMS {rms} is not worth sending; lower the learning rate")
    return bfloat16(rms)


def _dot(a: F32, b: F32) -> float:
    """Inner product, float32 within a piece and float64 beyond."""
    a, b = a.reshape(-1), b.reshape(-1)
    return sum(float(np.vdot(a[piece], b[piece])) for piece in pieces(slice(0, a.size)))


def _cosine(wanted: F32, sent: F32) -> float:
    norms = math.sqrt(_dot(wanted, wanted) * _dot(sent, sent))
    if norms == 0.0:
        return 1.0 if not wanted.any() and not sent.any() else 0.0
    return min(1.0, max(-1.0, _dot(wanted, sent) / norms))
