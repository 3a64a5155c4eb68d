"""The learned half of the codec: one orthonormal encoder per kind of factor, by PCA.

Knows linear algebra and layouts. Does not know quantizers, headers or training by gradients
(`cg_fedllm.py`), whose encoders it accepts.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from compression.blocks import F32, Layout, Tensors, kind_of
from compression.errors import CodecError

F16 = npt.NDArray[np.float16]
F64 = npt.NDArray[np.float64]

LEVELS = 6
"""Classes of latents per kind, half an octave of expected size apart; the last takes the rest."""


@dataclass(frozen=True)
class Basis:
    """What the coordinator learned from earlier updates, and devices receive.

    stored: kind -> float16 (block, width), as it travels; `encoders` are the exact matrices.
    tensor_levels: uint8 (tensors,), channel_levels: kind -> uint8 (width,): how many half octaves
    below the largest a latent is expected to be; their sum picks its class.
    """

    stored: Mapping[str, F16]
    tensor_levels: npt.NDArray[np.uint8]
    channel_levels: Mapping[str, npt.NDArray[np.uint8]]

    @cached_property
    def encoders(self) -> dict[str, F32]:
        """kind -> float32 (block, width) with orthonormal columns; the decoder is the transpose."""
        return {kind: orthonormal(matrix) for kind, matrix in self.stored.items()}

    @property
    def width(self) -> int:
        """Latents per block."""
        return int(next(iter(self.stored.values())).shape[1])

    def encode(self, blocks: F32, layout: Layout) -> F32:
        """Latents (rows, width) of blocks (rows, block)."""
        latents = np.empty((layout.rows, self.width), np.float32)
        for kind, rows in layout.kind_rows.items():
            np.matmul(blocks[rows], self.encoders[kind], out=latents[rows])
        return latents

    def decode(self, latents: F32, layout: Layout) -> F32:
        """Blocks (rows, block) of latents (rows, width)."""
        blocks = np.empty((layout.rows, layout.block), np.float32)
        for kind, rows in layout.kind_rows.items():
            np.matmul(latents[rows], self.encoders[kind].T, out=blocks[rows])
        return blocks

    def classes(self, layout: Layout) -> list[npt.NDArray[np.intp]]:
        """Indices into flat latents, LEVELS classes per kind in the order of `layout.kinds`."""
        groups = []
        for kind, rows in layout.kind_rows.items():
            levels = np.concatenate(
                [
                    np.full(span.stop - span.start, level)
                    for name, span, level in zip(
                        layout.names, layout.tensor_rows, self.tensor_levels, strict=True
                    )
                    if kind_of(name) == kind
                ]
            )
            total = levels[:, None].astype(int) + self.channel_levels[kind]  # (rows of kind, width)
            flat = np.minimum(total, LEVELS - 1).reshape(-1)
            start = rows.start * total.shape[1]
            groups += [np.flatnonzero(flat == level) + start for level in range(LEVELS)]
        return groups


def orthonormal(matrix: npt.NDArray[np.floating]) -> F32:
    """The nearest matrix with orthonormal columns, float32, from one that almost has them.

    An encoder travels as float16; both sides restore its orthonormality by this same iteration.

    Raises:
        CodecError: not finite, or too far from orthonormal for an encoder.
    """
    w = matrix.astype(np.float64)
    identity = np.eye(w.shape[1])
    if not np.isfinite(w).all() or np.abs(w.T @ w - identity).max() > 0.1:
        raise CodecError("an encoder's columns are not orthonormal")
    for _ in range(4):  # Newton-Schulz: the error is squared each time, 1e-3 -> below 1e-12
        w = w @ (1.5 * identity - 0.5 * (w.T @ w))
    return w.astype(np.float32)


def learn(
    updates: Iterable[Tensors],
    layout: Layout,
    *,
    width: int,
    encoders: Mapping[str, npt.NDArray[np.floating]] | None = None,
) -> Basis:
    """PCA of all blocks of the given updates, each divided by its kind's RMS; no mean is removed.

    All rounds count alike (TGAP's temporal ensemble). `encoders` replaces the PCA's by others with
    orthonormal columns (block, width), such as those refined in `cg_fedllm.py`.

    Raises:
        CodecError: no updates, all zero, of another layout, or a width that is not in 1..block.
    """
    if not 1 <= width <= layout.block:
        raise CodecError(f"width {width} is not in 1..{layout.block}")
    moments = {kind: np.zeros((layout.block, layout.block)) for kind in layout.kinds}
    norms, count = np.zeros(len(layout.names)), 0
    for update in updates:
        blocks = normalised(layout.pack(update), layout)
        count += 1
        for kind, rows in layout.kind_rows.items():
            part = blocks[rows].astype(np.float64)
            moments[kind] += part.T @ part
        norms += [float(np.square(blocks[rows]).mean()) for rows in layout.tensor_rows]
    if count == 0 or not any(moment.any() for moment in moments.values()):
        raise CodecError("a codec needs at least one update that is not zero to learn from")
    given = encoders or {}
    stored = {kind: _encoder(moments[kind], width, given.get(kind)) for kind in layout.kinds}
    channels = {}
    for kind, matrix in stored.items():
        w = orthonormal(matrix)
        energy = np.einsum("ik,ij,jk->k", w, moments[kind], w)  # (width,) energy of each latent
        channels[kind] = _levels(energy)
    return Basis(stored, _levels_by_kind(norms, layout), channels)


def normalised(blocks: F32, layout: Layout) -> F32:
    """Blocks divided by the RMS of their kind; a kind that is all zero stays zero."""
    out = np.zeros_like(blocks)
    for rows in layout.kind_rows.values():
        rms = math.sqrt(float(np.square(blocks[rows], dtype=np.float64).mean()))
        if rms > 0:
            out[rows] = blocks[rows] / np.float32(rms)
    return out


def _encoder(moment: F64, width: int, given: npt.NDArray[np.floating] | None) -> F16:
    if given is None:
        _, vectors = np.linalg.eigh(moment)
        given = vectors[:, ::-1][:, :width]
        # The sign of an eigenvector is arbitrary; fixing it makes equal inputs give equal codecs.
        largest = given[np.abs(given).argmax(axis=0), np.arange(width)]
        given = given * np.where(largest < 0, -1.0, 1.0)
    if given.shape != (moment.shape[0], width):
        raise CodecError(f"an encoder has shape {given.shape}, not {(moment.shape[0], width)}")
    return given.astype(np.float16)


def _levels(energy: F64) -> npt.NDArray[np.uint8]:
    relative = energy / max(float(energy.max()), 1e-300)
    octaves = -np.log2(np.maximum(relative, 2.0**-20))  # of energy, so half octaves of size
    return np.minimum(np.rint(octaves), LEVELS - 1).astype(np.uint8)


def _levels_by_kind(norms: F64, layout: Layout) -> npt.NDArray[np.uint8]:
    levels = np.zeros(len(layout.names), np.uint8)
    for kind in layout.kinds:
        members = [i for i, name in enumerate(layout.names) if kind_of(name) == kind]
        levels[members] = _levels(norms[members])
    return levels
