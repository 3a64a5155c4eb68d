"""Error feedback: what a device's codes have not yet said. Knows arrays; knows no codec.

With v = delta + e, the device sends code(v) and keeps e' = v - decode(code(v)). Sums telescope:
the decoded updates of T rounds add up to the deltas plus e_0 - e_T, so nothing is ever lost, only
late. It is kept in float32, like the update: a rounding (2^-24 of a value) at each step, both ways.

Source: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019 (arXiv 1901.09847), algorithm 2.
"""

import numpy as np
from safetensors.numpy import save

from compression import tensor_file
from compression.blocks import F32, Layout
from compression.errors import CodecError


class FeedbackState:
    """The residual of one device for one adapter; begins empty and is changed by `encode`.

    Store `to_bytes()` together with the message that carries the codes: the two belong to the same
    step. The residual is as private as the update itself.
    """

    def __init__(self) -> None:
        self._residual: F32 | None = None  # (rows, block)
        self._layout: bytes | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is owed."""
        return self._residual is None

    def norm(self) -> float:
        """Euclidean norm of what is owed."""
        return 0.0 if self._residual is None else float(np.linalg.norm(self._residual))

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

    def keep(self, residual: F32, layout: Layout) -> None:
        """Remember this residual (rows, block)."""
        self._residual, self._layout = residual, layout.hash

    def owe(self, blocks: F32, layout: Layout) -> None:
        """Take over blocks (rows, block) of which nothing could be sent: all of them come later.

        Raises:
            CodecError: the residual belongs to an adapter of another layout.
        """
        self.keep(self.add_to(blocks, layout), layout)

    def tensors(self, layout: Layout) -> dict[str, F32]:
        """The residual by tensor name, float32; zeros when empty."""
        blocks = self.add_to(np.zeros((layout.rows, layout.block), np.float32), layout)
        return layout.unpack(blocks)

    def to_bytes(self) -> bytes:
        """A safetensors blob."""
        if self._residual is None or self._layout is None:
            return b""
        return save({"residual": self._residual}, metadata={"layout": self._layout.hex()})

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
        except (KeyError, ValueError) as exc:
            raise CodecError(f"not a feedback state: {exc}") from exc
        if residual.dtype != np.float32 or residual.ndim != 2 or not np.isfinite(residual).all():
            raise CodecError("not a feedback state: the residual must be finite float32 blocks")
        state._residual, state._layout = residual.copy(), layout
        return state
