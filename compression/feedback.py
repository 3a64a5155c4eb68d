"""Error feedback: what a device's codes have not yet said. Knows arrays; knows no codec.

With v = delta + e, the device sends code(v) and keeps e' = v - decode(code(v)). Sums telescope:
the decoded updates of T rounds add up to the deltas plus e_0 - e_T, so nothing is ever lost, only
late. It is kept in float32, like the update: a rounding (2^-24 of a value) at each step, both ways.

Source: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019 (arXiv 1901.09847), algorithm 2.

A device that trains from the common adapter learns what it still owes a second time, and its
backlog grows by it. So its next training starts ahead: at the common adapter plus what it owes, as
far as AHEAD of its last steps go. The update stays what the training changed. That local models
keep their residual is CSER's (Xie et al. 2020, arXiv 2007.13221); the bound is ours, for at a
thousand times fewer bytes the debt is seven steps long and no place to train from (DECISIONS 105).
"""

import math

import numpy as np
from safetensors.numpy import save

from compression import tensor_file
from compression.blocks import F32, Layout
from compression.errors import CodecError

AHEAD = 1.5
"""How far ahead of the common adapter a device starts at most, in norms of its last update."""


def norm_of(blocks: F32) -> float:
    """Euclidean norm of blocks (rows, block), summed in float64."""
    return math.sqrt(np.einsum("ij,ij->", blocks, blocks, dtype=np.float64))


def share_ahead(owed: float, step: float) -> float:
    """The share of its debt that a device starts ahead by, in [0, 1]; both are norms."""
    return min(1.0, AHEAD * step / owed) if owed > 0 else 0.0


class FeedbackState:
    """The residual of one device for one adapter; begins empty and is changed by `encode`.

    Store `to_bytes()` together with the message that carries the codes: the two belong to the same
    step. The residual is as private as the update itself.
    """

    def __init__(self) -> None:
        self._residual: F32 | None = None  # (rows, block)
        self._layout: bytes | None = None
        self._step = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing is owed."""
        return self._residual is None

    def norm(self) -> float:
        """Euclidean norm of what is owed."""
        return 0.0 if self._residual is None else norm_of(self._residual)

    def add_to(self, blocks: F32, layout: Layout) -> F32:
        """Add the residual to blocks (rows, block), in place; return them.

        Raises:
            CodecError: the residual belongs to an adapter of another layout.
        """
        if self._residual is None:
            return blocks
        if self._layout != layout.hash:
            raise CodecError(
                "the error feedback kept here belongs to an adapter of other shapes; "
                "begin with a new FeedbackState"
            )
        blocks += self._residual
        return blocks

    def keep(self, residual: F32, layout: Layout, step: float) -> None:
        """Remember this residual (rows, block), and the norm of the last update."""
        self._residual, self._layout, self._step = residual, layout.hash, step

    def ahead(self, layout: Layout) -> dict[str, F32]:
        """How far ahead of the common adapter the next training starts, float32 by tensor name.

        Raises:
            CodecError: the residual belongs to an adapter of another layout.
        """
        share = np.float32(share_ahead(self.norm(), self._step))
        return {name: share * value for name, value in self.tensors(layout).items()}

    def owe(self, blocks: F32, layout: Layout) -> None:
        """Take over blocks (rows, block) of which nothing could be sent: all of them come later.

        Raises:
            CodecError: the residual belongs to an adapter of another layout.
        """
        step = norm_of(blocks)
        self.keep(self.add_to(blocks, layout), layout, step)

    def tensors(self, layout: Layout) -> dict[str, F32]:
        """The residual by tensor name, float32; zeros when empty."""
        blocks = self.add_to(np.zeros((layout.rows, layout.block), np.float32), layout)
        return layout.unpack(blocks)

    def to_bytes(self) -> bytes:
        """A safetensors blob."""
        if self._residual is None or self._layout is None:
            return b""
        tensors = {"residual": self._residual, "step": np.array([self._step])}
        return save(tensors, metadata={"layout": self._layout.hex()})

    @classmethod
    def from_bytes(cls, data: bytes) -> "FeedbackState":
        """The state that `to_bytes` wrote.

        Raises:
            CodecError: the bytes are no feedback state.
        """
        state = cls()
        if not data:
            return state
        try:
            tensors, metadata = tensor_file.read(data)
            residual, layout = tensors["residual"], bytes.fromhex(metadata["layout"])
            step = float(tensors["step"].item())
        except (KeyError, ValueError) as exc:
            raise CodecError(f"not a feedback state: {exc}") from exc
        if residual.dtype != np.float32 or residual.ndim != 2 or not np.isfinite(residual).all():
            raise CodecError("not a feedback state: the residual must be finite float32 blocks")
        if not 0.0 <= step < math.inf:
            raise CodecError(f"not a feedback state: a last step of {step}")
        state._residual, state._layout, state._step = residual.copy(), layout, step
        return state
