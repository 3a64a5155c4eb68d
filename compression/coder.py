"""Codes blocks within a byte target and decodes them: the way through transform, quantizer, coder.

Knows bases, quantizers and headers. Does not know tensors, files or error feedback.

Encoding, step by step (v is the update plus what error feedback owes, in blocks):
1. divide each kind of factor by its RMS                                 x = v / rms
2. latents by the learned encoder (numpy, or its ONNX graph)             z = x W
3. choose the step for the byte target; compare the outlook with the plain dead-zone quantizer's at
   equal bytes
4. quantize with a dead zone, range-code class by class
5. decode our own bytes, measure the cosine; a learned result below the plain quantizer's is thrown
   away for it (the gate; the header's method says so)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compression import entropy, quantizer
from compression.basis import Basis
from compression.blocks import F32, Layout
from compression.errors import CodecError
from compression.header import Header, Method, bfloat16, header_bytes

GATE_MARGIN = 0.999
"""A learned cosine may be this little below the plain quantizer's, which is an estimate."""

F64 = npt.NDArray[np.float64]
_Group = slice | npt.NDArray[np.intp]


class EncoderSession(Protocol):
    """What `onnxruntime.InferenceSession` offers that we use."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> Any:
        """Return the outputs as a list of arrays."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Codes, and the blocks (rows, block) that they stand for with their cosine."""

    data: bytes
    method: Method
    sent: F32
    cosine: float


class Coder:
    """The coding half of a `Compressor`; `codec` is the four-byte id that headers carry."""

    def __init__(self, layout: Layout, basis: Basis | None, codec: bytes) -> None:
        self._layout, self._basis, self._codec = layout, basis, codec

    def encode(
        self, wanted: F64, bytes_target: int, session: EncoderSession | None = None
    ) -> Draft:
        """Code blocks (rows, block) in `bytes_target` bytes, or in the least that is possible."""
        rms = tuple(self._rms(wanted[rows]) for rows in self._layout.kind_rows.values())
        x = np.zeros(wanted.shape, np.float32)
        for scale, rows in zip(rms, self._layout.kind_rows.values(), strict=True):
            if scale > 0:
                np.multiply(wanted[rows], 1 / scale, out=x[rows], casting="same_kind")  # step 1
        plain = self._plan(Method.DEAD_ZONE, x, rms, wanted)
        if self._basis is None:
            return self._within(plain, plain.step_for(bytes_target), rms, wanted, bytes_target)
        z = self._basis.encode(x, self._layout) if session is None else self._run(session, x)
        learned = self._plan(Method.LEARNED, z, rms, wanted)  # step 2
        step, plain_step = learned.step_for(bytes_target), plain.step_for(bytes_target)
        floor = plain.spectrum.at(plain_step).cosine * GATE_MARGIN
        if learned.spectrum.at(step).cosine >= floor:  # step 3
            draft = self._within(learned, step, rms, wanted, bytes_target)
            if draft.cosine >= floor * GATE_MARGIN:  # step 5
                return draft
        return self._within(plain, plain_step, rms, wanted, bytes_target)

    def _rms(self, part: F64) -> float:
        rms = math.sqrt(float(np.square(part).mean()))
        if not math.isfinite(rms) or rms > 1e30:
            raise CodecError(
                f"an update of RMS {rms} is not worth sending; lower the learning rate"
            )
        return bfloat16(rms)

    def _plan(self, method: Method, z: F32, rms: tuple[float, ...], wanted: F64) -> "_Plan":
        groups = self._classes(method)
        flat = z.reshape(-1)
        values = [flat[group] for group in groups]
        per_kind = len(groups) // len(rms)
        energy = [scale**2 for scale in rms for _ in range(per_kind)]
        total = float(np.square(wanted).sum())
        overhead = header_bytes(len(rms)) + 2 * len(groups) + 4  # 4: the range coder's last word
        return _Plan(method, values, quantizer.Spectrum(values, energy, total), overhead)

    def _within(
        self, plan: "_Plan", step: float, rms: tuple[float, ...], wanted: F64, target: int
    ) -> Draft:
        # The outlook is an estimate; what counts is the true length, so coarsen until it fits.
        draft = self._quantized(plan, step, rms, wanted)
        while len(draft.data) > target and step < quantizer.STEP_RANGE[1]:
            step *= 1.005
            draft = self._quantized(plan, step, rms, wanted)
        return draft

    def _quantized(self, plan: "_Plan", step: float, rms: tuple[float, ...], wanted: F64) -> Draft:
        step = float(np.float16(step))
        symbols = [quantizer.quantize(values, step) for values in plan.values]  # step 4
        top = max(1, *(int(np.abs(part).max(initial=0)) for part in symbols))
        models = [entropy.ClassModel.of(part) for part in symbols]
        offsets = quantizer.centroids(plan.values, symbols, step)
        layout = self._layout.hash[:4]
        header = Header(plan.method, self._codec, layout, rms, step, offsets, top)
        body = bytes(code for model in models for code in (model.nonzero, model.fall))
        body += entropy.encode(symbols, models, top)
        sent = self._synthesise(header, symbols)
        return Draft(header.encode(body), plan.method, sent, _cosine(wanted, sent))

    def decode(self, header: Header, body: bytes) -> F32:
        """Blocks (rows, block) of a header and its body.

        Raises:
            CodecError: the body is no code for this layout, or stands for non-finite values.
        """
        groups = self._classes(header.method)
        start = 2 * len(groups)
        if len(header.rms) != len(self._layout.kinds) or len(body) < start or header.top < 1:
            raise CodecError("the codes are too short for their models")
        models = [
            entropy.ClassModel(*pair) for pair in zip(body[0:start:2], body[1:start:2], strict=True)
        ]
        sizes = [g.stop - g.start if isinstance(g, slice) else g.size for g in groups]
        symbols = entropy.decode(body[start:], sizes, models, header.top)
        with np.errstate(over="ignore", invalid="ignore"):  # forged scales; refused below
            blocks = self._synthesise(header, symbols)
        if not np.isfinite(blocks).all():
            raise CodecError("the codes stand for values that are not finite")
        return blocks

    def _synthesise(self, header: Header, symbols: Sequence[entropy.I32]) -> F32:
        groups = self._classes(header.method)
        width = self._width(header.method)
        z = np.empty(self._layout.rows * width, np.float32)
        for group, part in zip(groups, symbols, strict=True):
            z[group] = quantizer.dequantize(part, header.step, header.offsets)
        blocks = z.reshape(-1, width)
        if header.method is Method.LEARNED and self._basis is not None:
            blocks = self._basis.decode(blocks, self._layout)
        for scale, rows in zip(header.rms, self._layout.kind_rows.values(), strict=True):
            blocks[rows] *= np.float32(scale)
        self._layout.clear_padding(blocks)
        return blocks

    def _width(self, method: Method) -> int:
        if method is Method.LEARNED and self._basis is not None:
            return self._basis.width
        return self._layout.block

    def _classes(self, method: Method) -> "list[_Group]":
        if method is Method.LEARNED:
            return self._learned_classes
        block = self._layout.block
        spans = self._layout.kind_rows.values()
        return [slice(rows.start * block, rows.stop * block) for rows in spans]

    @cached_property
    def _learned_classes(self) -> "list[_Group]":
        return list(self._basis.classes(self._layout)) if self._basis is not None else []

    def _run(self, session: EncoderSession, x: F32) -> F32:
        latents = np.asarray(session.run(["latents"], {"blocks": x})[0], np.float32)
        if latents.shape != (len(x), self._width(Method.LEARNED)):
            raise CodecError(
                f"the encoder's graph returned shape {latents.shape}; not this codec's"
            )
        if not np.isfinite(latents).all():
            raise CodecError("the encoder's graph returned values that are not finite")
        return latents


@dataclass(frozen=True, slots=True)
class _Plan:
    method: Method
    values: list[F32]
    spectrum: quantizer.Spectrum
    overhead: int

    def step_for(self, size: float) -> float:
        return self.spectrum.step_for(8.0 * max(size - self.overhead, 0.0))


def _cosine(wanted: F64, sent: F32) -> float:
    given = sent.astype(np.float64)
    norms = float(np.linalg.norm(wanted)) * float(np.linalg.norm(given))
    if norms == 0.0:
        return 1.0 if not wanted.any() and not sent.any() else 0.0
    return min(1.0, max(-1.0, float(np.vdot(wanted, given)) / norms))
