"""Codes blocks within a byte target and decodes them: the way through transform, quantizer, coder.

Knows bases, quantizers and headers. Does not know tensors, files or error feedback.

Encoding, step by step (v is the update plus what error feedback owes, in blocks):
1. a moving basis takes the trend out: a few numbers                     u = v - sum of c_j T_j
2. divide each kind of factor (or all, for a moving basis) by its RMS    x = u / rms
3. latents: by the learned encoder (numpy, or its ONNX graph), by the moving basis, or x itself
4. choose the step for the byte target, quantize with a dead zone, range-code class by class
5. decode our own bytes, measure the cosine; a result below the plain dead-zone quantizer's at equal
   bytes is thrown away for that (the gate; the header's method says so)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compression import entropy, quantizer
from compression.basis import Basis
from compression.blocks import F32, Layout
from compression.errors import CodecError
from compression.header import Header, Method, bfloat16, header_bytes
from compression.moving import MovingBasis
from compression.transforms import EncoderSession, Plain, transforms

GATE_MARGIN = 0.998
"""A cosine may be this little below the plain quantizer's, which is an estimate."""

F16 = npt.NDArray[np.float16]
F64 = npt.NDArray[np.float64]


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
        self, wanted: F64, bytes_target: int, session: EncoderSession | None = None
    ) -> Draft:
        """Code blocks (rows, block) in `bytes_target` bytes, or in the least that is possible."""
        plain, *better = (
            self._plan(method, way, wanted, session) for method, way in self._ways.items()
        )
        step = plain.step_for(bytes_target)
        for plan in better:
            draft = self._within(plan, plan.step_for(bytes_target), wanted, bytes_target)
            floor = plain.spectrum.at(step).cosine * GATE_MARGIN
            if draft.cosine >= floor and len(draft.data) <= bytes_target:  # step 5
                return draft
        return self._within(plain, step, wanted, bytes_target)

    def _plan(
        self, method: Method, way: Plain, wanted: F64, session: EncoderSession | None
    ) -> "_Plan":
        trend = way.project(wanted).astype(np.float16)
        rest = wanted - way.along(trend)  # step 1
        rms = tuple(_rms(rest[rows]) for rows in way.spans)
        x = np.zeros(rest.shape, np.float32)
        for scale, rows in zip(rms, way.spans, strict=True):
            if scale > 0:
                np.multiply(rest[rows], 1 / scale, out=x[rows], casting="same_kind")  # step 2
        flat = way.latents(x, session).reshape(-1)  # step 3
        values = [flat[group] for group in way.classes]
        energy = [scale**2 for scale in rms for _ in range(len(way.classes) // len(rms))]
        total = float(np.square(rest).sum())
        # 4: the range coder's last word
        overhead = header_bytes(len(rms)) + 2 * trend.size + 2 * len(way.classes) + 4
        spectrum = quantizer.Spectrum(values, energy, total)
        return _Plan(method, trend, rms, values, spectrum, overhead)

    def _within(self, plan: "_Plan", step: float, wanted: F64, target: int) -> Draft:
        # The outlook is an estimate; what counts is the true length, so coarsen until it fits.
        draft = self._quantized(plan, step, wanted)
        while len(draft.data) > target and step < quantizer.STEP_RANGE[1]:
            step *= 1.005
            draft = self._quantized(plan, step, wanted)
        return draft

    def _quantized(self, plan: "_Plan", step: float, wanted: F64) -> Draft:
        step = float(np.float16(step))
        symbols = [quantizer.quantize(values, step) for values in plan.values]  # step 4
        top = max(1, *(int(np.abs(part).max(initial=0)) for part in symbols))
        models = [entropy.ClassModel.of(part) for part in symbols]
        offsets = quantizer.centroids(plan.values, symbols, step)
        layout = self._layout.hash[:4]
        header = Header(plan.method, self._codec, layout, plan.rms, step, offsets, top)
        body = plan.trend.astype("<f2").tobytes()
        body += bytes(code for model in models for code in (model.nonzero, model.fall))
        body += entropy.encode(symbols, models, top)
        sent = self._synthesise(header, plan.trend, symbols)
        return Draft(header.encode(body), plan.method, sent, _cosine(wanted, sent))

    def decode(self, header: Header, body: bytes) -> F32:
        """Blocks (rows, block) of a header and its body.

        Raises:
            CodecError: the body is no code for this layout, or stands for non-finite values.
        """
        way = self._ways[header.method]
        first = 2 * len(way.trend)
        start = first + 2 * len(way.classes)
        if len(header.rms) != len(way.spans) or len(body) < start or header.top < 1:
            raise CodecError("the codes are too short for their models")
        trend = np.frombuffer(body[:first], "<f2")
        pairs = zip(body[first:start:2], body[first + 1 : start : 2], strict=True)
        models = [entropy.ClassModel(*pair) for pair in pairs]
        sizes = [g.stop - g.start if isinstance(g, slice) else g.size for g in way.classes]
        symbols = entropy.decode(body[start:], sizes, models, header.top)
        with np.errstate(over="ignore", invalid="ignore"):  # forged scales; refused below
            blocks = self._synthesise(header, trend, symbols)
        if not np.isfinite(blocks).all():
            raise CodecError("the codes stand for values that are not finite")
        return blocks

    def _synthesise(self, header: Header, trend: F16, symbols: Sequence[entropy.I32]) -> F32:
        way = self._ways[header.method]
        z = np.zeros(self._layout.rows * way.width, np.float32)  # padding may have no latents
        for group, part in zip(way.classes, symbols, strict=True):
            z[group] = quantizer.dequantize(part, header.step, header.offsets)
        blocks = way.blocks(z.reshape(-1, way.width))
        for scale, rows in zip(header.rms, way.spans, strict=True):
            blocks[rows] *= np.float32(scale)
        blocks += way.along(trend)
        self._layout.clear_padding(blocks)
        return blocks


@dataclass(frozen=True, slots=True)
class _Plan:
    method: Method
    trend: F16  # (k,)
    rms: tuple[float, ...]
    values: list[F32]
    spectrum: quantizer.Spectrum
    overhead: int

    def step_for(self, size: float) -> float:
        return self.spectrum.step_for(8.0 * max(size - self.overhead, 0.0))


def _rms(part: F64) -> float:
    rms = math.sqrt(float(np.square(part).mean()))
    if not math.isfinite(rms) or rms > 1e30:
        raise CodecError(f"an update of RMS {rms} is not worth sending; lower the learning rate")
    return bfloat16(rms)


def _cosine(wanted: F64, sent: F32) -> float:
    given = sent.astype(np.float64)
    norms = float(np.linalg.norm(wanted)) * float(np.linalg.norm(given))
    if norms == 0.0:
        return 1.0 if not wanted.any() and not sent.any() else 0.0
    return min(1.0, max(-1.0, float(np.vdot(wanted, given)) / norms))
