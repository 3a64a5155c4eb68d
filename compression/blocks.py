"""How adapter tensors become rows of equal length, and back. Knows numpy; knows no codec.

The factors of LoRA are cut into blocks of `block` consecutive values: A (r, in) along the input,
B (out, r) along the output (it is transposed first), so that a block is always a stretch of one
rank component. Rows of one kind of factor are contiguous; each tensor is padded to whole blocks.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from compression.errors import CodecError

F32 = npt.NDArray[np.float32]
Tensors = Mapping[str, npt.NDArray[np.float32]]

BLOCK = 64
"""Values per block. Its square is what an encoder costs to send: 8 KiB a kind at 64."""

MAX_BLOCK = 1024
MAX_TENSORS = 65_536
MAX_VALUES = 2**28
"""Most values of one update; 1 GiB as float32, a rank-64 adapter of a 70 B model."""

KINDS = ("A", "B", "other")
"""Kinds of tensors that share an encoder; "other" is what is no LoRA factor, such as a head."""


def kind_of(name: str) -> str:
    """The kind of a tensor by its name: "A" for `.lora_A`, "B" for `.lora_B`, else "other"."""
    if ".lora_A" in name:
        return "A"
    return "B" if ".lora_B" in name else "other"


@dataclass(frozen=True)
class Layout:
    """Which tensors an update has, in canonical order (by kind, then name), and their blocks.

    Raises:
        CodecError: no tensors, a repeated name, or sizes over the limits of this module.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    block: int = BLOCK
    kinds: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        pairs = zip(self.names, self.shapes, strict=True)
        ordered = sorted(pairs, key=lambda pair: (KINDS.index(kind_of(pair[0])), pair[0]))
        names = tuple(name for name, _ in ordered)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "shapes", tuple(tuple(shape) for _, shape in ordered))
        present = {kind_of(name) for name in names}
        object.__setattr__(self, "kinds", tuple(kind for kind in KINDS if kind in present))

    @classmethod
    def of(cls, tensors: Tensors, *, block: int = BLOCK) -> "Layout":
        """The layout of these tensors."""
        return cls(tuple(tensors), tuple(value.shape for value in tensors.values()), block)

    @property
    def values(self) -> int:
        """Number of values of an update, padding not counted."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def rows(self) -> int:
        """Number of blocks."""
        return int(self.tensor_rows[-1].stop)

    @cached_property
    def tensor_rows(self) -> tuple[slice, ...]:
        """The rows of each tensor, in the order of `names`."""
        slices, start = [], 0
        for shape in self.shapes:
            stop = start + -(-math.prod(shape) // self.block)
            slices.append(slice(start, stop))
            start = stop
        return tuple(slices)

    @cached_property
    def kind_rows(self) -> dict[str, slice]:
        """The contiguous rows of each kind that is present."""
        spans: dict[str, slice] = {}
        for name, rows in zip(self.names, self.tensor_rows, strict=True):
            kind = kind_of(name)
            spans[kind] = slice(spans[kind].start if kind in spans else rows.start, rows.stop)
        return spans

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Each tensor's shape as the matrix that its rows hold: LoRA's factors are (r, long)."""
        found = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            stored = shape[::-1] if _transposed(name, shape) else shape
            first = stored[0] if len(stored) > 1 else 1
            found.append((first, math.prod(stored) // first))
        return tuple(found)

    @cached_property
    def hash(self) -> bytes:
        """SHA-256 of names, shapes and block length."""
        text = json.dumps([self.block, self.names, self.shapes], separators=(",", ":"))
        return hashlib.sha256(text.encode()).digest()

    def pack(self, tensors: Tensors) -> F32:
        """Return the tensors as float32 blocks (rows, block), zero-padded.

        Raises:
            CodecError: other names or shapes than the layout's, or values that are not finite.
        """
        if set(tensors) != set(self.names):
            odd = sorted(set(tensors) ^ set(self.names))[:3]
            raise CodecError(f"the update's tensors differ from the layout's, for example {odd}")
        blocks = np.zeros((self.rows, self.block), np.float32)
        for name, shape, rows in zip(self.names, self.shapes, self.tensor_rows, strict=True):
            value = np.asarray(tensors[name])
            if value.shape != shape:
                raise CodecError(f"{name}: shape {value.shape}, the layout says {shape}")
            flat = (value.T if _transposed(name, shape) else value).reshape(-1)
            blocks[rows].reshape(-1)[: flat.size] = flat
        if not np.isfinite(blocks).all():
            raise CodecError("the update holds values that are not finite; do not send it")
        return blocks

    def unpack(self, blocks: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the tensors (copies, dtype of the blocks) of blocks (rows, block)."""
        tensors = {}
        for name, shape, rows in zip(self.names, self.shapes, self.tensor_rows, strict=True):
            flat = blocks[rows].reshape(-1)[: math.prod(shape)]
            value = flat.reshape(shape[::-1]).T if _transposed(name, shape) else flat.reshape(shape)
            tensors[name] = np.array(value, order="C")
        return tensors

    def clear_padding(self, blocks: npt.NDArray[Any]) -> None:
        """Set what lies behind each tensor's last value to zero, in place."""
        for shape, rows in zip(self.shapes, self.tensor_rows, strict=True):
            blocks[rows].reshape(-1)[math.prod(shape) :] = 0

    def _check(self) -> None:
        if not self.names or len(self.names) > MAX_TENSORS or len(self.names) != len(self.shapes):
            raise CodecError(f"a layout needs 1 to {MAX_TENSORS} tensors, each with its shape")
        if len(set(self.names)) != len(self.names):
            raise CodecError("a layout names a tensor twice")
        if not 8 <= self.block <= MAX_BLOCK:
            raise CodecError(f"block {self.block} is not in 8..{MAX_BLOCK}")
        if any(n < 1 for shape in self.shapes for n in shape) or self.values > MAX_VALUES:
            raise CodecError(f"tensor sizes must be positive and sum to at most {MAX_VALUES}")


def _transposed(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and kind_of(name) == "B"
