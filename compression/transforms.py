"""The transforms before the quantizer: none, a learned encoder, the moving basis.

Knows bases and layouts. Does not know quantizers, headers or byte targets.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compression.basis import Basis
from compression.blocks import F32, Layout
from compression.errors import CodecError
from compression.header import Method
from compression.moving import MovingBasis

F64 = npt.NDArray[np.float64]
Group = slice | npt.NDArray[np.intp]


class EncoderSession(Protocol):
    """What `onnxruntime.InferenceSession` offers that we use."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> Any:
        """Return the outputs as a list of arrays."""


class Plain:
    """No transform: values are coded as they are. The others change what they do better.

    Attributes:
        width: latents of a block.
        spans: rows that share a scale.
        trend: directions (k, rows, block) whose part of an update is sent as one number each.
        classes: indices into flat latents that share a model of their probabilities.
    """

    def __init__(self, layout: Layout) -> None:
        self.width = layout.block
        self.spans: tuple[slice, ...] = tuple(layout.kind_rows.values())
        self.trend: F32 = np.zeros((0, layout.rows, layout.block), np.float32)
        self.classes: list[Group] = [
            slice(rows.start * self.width, rows.stop * self.width) for rows in self.spans
        ]

    def project(self, wanted: F64) -> F32:
        """What the update has of each trend, (k,)."""
        return np.zeros(0, np.float32)

    def along(self, parts: npt.NDArray[np.floating]) -> F32 | float:
        """The sum of the trends (rows, block), each times its part; 0.0 for none."""
        return 0.0

    def latents(self, x: F32, session: EncoderSession | None) -> F32:
        """Of blocks in units of their RMS."""
        return x

    def blocks(self, z: F32) -> F32:
        """The inverse of `latents`."""
        return z


class Learned(Plain):
    """One encoder per kind of factor, learned from earlier updates."""

    def __init__(self, layout: Layout, basis: Basis) -> None:
        super().__init__(layout)
        self._layout, self._basis = layout, basis
        self.width, self.classes = basis.width, list(basis.classes(layout))

    def latents(self, x: F32, session: EncoderSession | None) -> F32:
        """By the encoder, or by its graph in a session."""
        if session is None:
            return self._basis.encode(x, self._layout)
        latents = np.asarray(session.run(["latents"], {"blocks": x})[0], np.float32)
        if latents.shape != (len(x), self.width):
            raise CodecError(
                f"the encoder's graph returned shape {latents.shape}; not this codec's"
            )
        if not np.isfinite(latents).all():
            raise CodecError("the encoder's graph returned values that are not finite")
        return latents

    def blocks(self, z: F32) -> F32:
        """By the encoder's transpose."""
        return self._basis.decode(z, self._layout)


class Moving(Plain):
    """The eigenbasis and the trend of the adapter's last changes; one scale for all."""

    def __init__(self, layout: Layout, basis: MovingBasis) -> None:
        super().__init__(layout)
        self._basis = basis
        self.spans = (slice(0, layout.rows),)
        self.trend, self.classes = basis.trend, list(basis.classes)

    def project(self, wanted: F64) -> F32:
        """Inner products: the trend is orthonormal."""
        flat = self.trend.reshape(len(self.trend), -1)
        return np.asarray(flat @ wanted.reshape(-1).astype(np.float32))

    def along(self, parts: npt.NDArray[np.floating]) -> F32 | float:
        """As `Plain.along`."""
        flat = self.trend.reshape(len(self.trend), -1)
        return (parts.astype(np.float32) @ flat).reshape(self.trend.shape[1:])

    def latents(self, x: F32, session: EncoderSession | None) -> F32:
        """In the eigenbasis."""
        return self._basis.encode(x)

    def blocks(self, z: F32) -> F32:
        """Back from the eigenbasis."""
        return self._basis.decode(z)


def transforms(layout: Layout, basis: Basis | MovingBasis | None) -> dict[Method, Plain]:
    """What a codec can do to an update before it quantizes, the plain one first."""
    found: dict[Method, Plain] = {Method.DEAD_ZONE: Plain(layout)}
    if isinstance(basis, Basis):
        found[Method.LEARNED] = Learned(layout, basis)
    elif basis is not None:
        found[Method.MOVING] = Moving(layout, basis)
    return found
