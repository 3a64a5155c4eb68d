"""The transforms before the quantizer: none, a learned encoder, the moving basis.

Knows bases and layouts. Does not know quantizers, headers or byte targets.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compression.basis import Basis
from compression.blocks import F32, Layout
from compression.errors import CodecError
from compression.header import Method
from compression.moving import MovingBasis

F16 = npt.NDArray[np.float16]
Group = slice | npt.NDArray[np.integer]

PIECE = 1 << 14
"""Values worked on at once: with what is made of them they stay in a core's cache."""


class EncoderSession(Protocol):
    """What `onnxruntime.InferenceSession` offers that we use."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> Any:
        """Return the outputs as a list of arrays."""


class Plain:
    """No transform: values are coded as they are. The others change what they do better.

    Attributes:
        width: latents of a block.
        spans: rows that share a scale.
        trends: how many numbers an update has beside its latents.
        classes: indices into flat latents that share a model of their probabilities; as many for
            each span.
    """

    trends = 0

    def __init__(self, layout: Layout) -> None:
        self.width = layout.block
        self.spans: tuple[slice, ...] = tuple(layout.kind_rows.values())
        self.classes: list[Group] = [
            slice(rows.start * self.width, rows.stop * self.width) for rows in self.spans
        ]

    def latents(self, wanted: F32, session: EncoderSession | None) -> tuple[F16, F32]:
        """The trend's numbers (trends,) and the latents (rows, width) of blocks (rows, block)."""
        return np.zeros(0, np.float16), wanted

    def blocks(self, trend: F16, z: F32) -> F32:
        """The inverse of `latents`; uses up z."""
        return z


class Learned(Plain):
    """One encoder per kind of factor, learned from earlier updates."""

    def __init__(self, layout: Layout, basis: Basis) -> None:
        super().__init__(layout)
        self._layout, self._basis = layout, basis
        self.width, self.classes = basis.width, list(basis.classes(layout))

    def latents(self, wanted: F32, session: EncoderSession | None) -> tuple[F16, F32]:
        """By the encoder, or by its graph in a session."""
        none = np.zeros(0, np.float16)
        if session is None:
            return none, self._basis.encode(wanted, self._layout)
        latents = np.asarray(session.run(["latents"], {"blocks": wanted})[0], np.float32)
        if latents.shape != (len(wanted), self.width):
            raise CodecError(
                f"the encoder's graph returned shape {latents.shape}; not this codec's"
            )
        if not np.isfinite(latents).all():
            raise CodecError("the encoder's graph returned values that are not finite")
        return none, latents

    def blocks(self, trend: F16, z: F32) -> F32:
        """By the encoder's transpose."""
        return self._basis.decode(z, self._layout)


class Moving(Plain):
    """The eigenbasis and the trend of the adapter's last changes; one scale for all."""

    def __init__(self, layout: Layout, basis: MovingBasis) -> None:
        super().__init__(layout)
        self._basis, self.trends = basis, len(basis.trend)
        self.spans = (slice(0, layout.rows),)
        self.classes = list(basis.classes)

    def latents(self, wanted: F32, session: EncoderSession | None) -> tuple[F16, F32]:
        """The part along the trend, which is orthonormal, and the rest in the eigenbasis."""
        flat = self._basis.trend.reshape(self.trends, -1)
        trend = (flat @ wanted.reshape(-1)).astype(np.float16)
        rest = wanted.copy()
        self._add(rest, -trend)
        return trend, self._basis.encode(rest, out=rest)

    def blocks(self, trend: F16, z: F32) -> F32:
        """Back from the eigenbasis."""
        blocks = self._basis.decode(z, out=z)
        self._add(blocks, trend)
        return blocks

    def _add(self, blocks: F32, parts: F16) -> None:
        flat, along = blocks.reshape(-1), self._basis.trend.reshape(self.trends, -1)
        for piece in pieces(slice(0, flat.size)):
            flat[piece] += parts.astype(np.float32) @ along[:, piece]


def transforms(layout: Layout, basis: Basis | MovingBasis | None) -> dict[Method, Plain]:
    """What a codec can do to an update before it quantizes, the plain one first."""
    found: dict[Method, Plain] = {Method.DEAD_ZONE: Plain(layout)}
    if isinstance(basis, Basis):
        found[Method.LEARNED] = Learned(layout, basis)
    elif basis is not None:
        found[Method.MOVING] = Moving(layout, basis)
    return found


def length(group: Group) -> int:
    """How many indices a group has."""
    return group.stop - group.start if isinstance(group, slice) else group.size


def pieces(group: Group) -> Iterator[Any]:
    """A group's indices, PIECE at a time."""
    for start in range(0, length(group), PIECE):
        if isinstance(group, slice):
            first = group.start + start
            yield slice(first, min(first + PIECE, group.stop))
        else:
            yield group[start : start + PIECE]
