"""Torch layers over weights that stay in 4 or 8 bits, dequantized again for every use.

Knows torch and `Packed`. Does not know models, files, LoRA or training.

The values are those of `Packed.dequantize`, bit for bit, then rounded to the input's dtype. What
costs time is not arithmetic but passes over memory with short inner loops, so the codes are laid
out anew when a layer is made: transposed, (in, out), where a block's scales are one long row; two
rows that lie half a matrix apart share a byte, so that unpacking is two whole-array operations; and
everything is written into one scratch memory that all layers share. What costs next is the number
of such passes, so small matrices that follow each other are dequantized as one.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from compression.int4 import Packed

TILE_WEIGHTS = 2**20
"""Weights dequantized at once: 7 MiB of scratch, and pieces that BLAS still multiplies well."""

COLUMNS_STEP = 16
"""Tiles are a multiple of this wide, the floats in a vector register."""


class Scratch(threading.local):
    """Memory for one dequantized tile, made at first use, grown as needed, one per thread.

    Attributes:
        holds: what is in it, as its writer named it; None once anything was taken since.
    """

    def __init__(self) -> None:
        self._held: dict[torch.dtype, torch.Tensor] = {}
        self.holds: object = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `shape` with undefined values; the next call of this dtype overwrites it."""
        self.holds = None
        n = math.prod(shape)
        held = self._held.get(dtype)
        if held is None or held.numel() < n:
            held = self._held[dtype] = torch.empty(n, dtype=dtype)
        return held[:n].view(shape)

    def again(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor last taken of this dtype, as it is now."""
        return self._held[dtype][: math.prod(shape)].view(shape)


SHARED = Scratch()
"""The scratch of all layers: a tile is used up before the next is dequantized."""


class Tiles:
    """A blockwise matrix W (out, in) as tiles of its transpose, (in, columns) each.

    Attributes:
        shape: (out, in).
        bits: 4 or 8.
        count: tiles; tile i holds the outputs from i * columns on, padded with zeros at the end.
        columns: outputs per tile.
    """

    def __init__(self, packed: Packed) -> None:
        rows, self._width = packed.shape[0], packed.blocks * packed.block
        self.shape, self.bits, self._block = packed.shape, packed.bits, packed.block
        most = max(COLUMNS_STEP, TILE_WEIGHTS // self._width)
        self.count = math.ceil(rows / most)
        share = math.ceil(rows / self.count)
        self.columns = math.ceil(share / COLUMNS_STEP) * COLUMNS_STEP
        self.count = math.ceil(rows / self.columns)
        held = self._width * packed.bits // 8
        # Codes are kept less 2^(bits-1), so that they are signed and 0 is the usual zero point;
        # scales of 4-bit codes a sixteenth, for unpacking gives sixteen times the code: both exact.
        self._codes = torch.zeros(self.count, held, self.columns, dtype=torch.int8)
        self._scales = torch.zeros(
            self.count, packed.blocks, 1, self.columns, dtype=scales_dtype(packed)
        )
        self._name = object()
        self._zero: torch.Tensor | None = None
        if packed.zero_points is not None:
            self._zero = torch.zeros(self._scales.shape, dtype=torch.int8)
        for i in range(self.count):
            self._fill(i, packed)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = [self._codes, self._scales] + ([] if self._zero is None else [self._zero])
        return sum(part.nbytes for part in parts)

    def span(self, i: int) -> tuple[int, int]:
        """The outputs that tile `i` holds, from and to."""
        return i * self.columns, min((i + 1) * self.columns, self.shape[0])

    def tile(self, i: int, dtype: torch.dtype) -> torch.Tensor:
        """Tile `i` of the transpose, (in, outputs), in scratch memory: use it before the next."""
        shape = (self._width, self.columns)
        if SHARED.holds == (self._name, i, dtype):
            values = SHARED.again(shape, dtype)
        else:
            zero = None if self._zero is None else self._zero[i]
            values = self._values(self._codes[i], self._scales[i], zero, dtype).view(shape)
            SHARED.holds = (self._name, i, dtype)
        start, stop = self.span(i)
        return values[: self.shape[1], : stop - start]

    def parts(
        self, outputs: tuple[int, int], dtype: torch.dtype
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The transpose's columns for outputs from and to, as (from, to, (in, to - from)) counted
        from the first; each in scratch memory: use it before the next."""
        for i in range(self.count):
            start, stop = self.span(i)
            low, high = max(start, outputs[0]), min(stop, outputs[1])
            if low < high:
                found = self.tile(i, dtype)[:, low - start : high - start]
                yield low - outputs[0], high - outputs[0], found

    def rows(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of W for a flat int64 index (n,), as a new tensor (n, in)."""
        tile, column = index // self.columns, index % self.columns
        codes = self._codes[tile, :, column].T.contiguous()  # (held, n)
        scales = self._scales[tile, :, :, column].permute(1, 2, 0).contiguous()
        zero = None
        if self._zero is not None:
            zero = self._zero[tile, :, :, column].permute(1, 2, 0).contiguous()
        values = self._values(codes, scales, zero, dtype).view(self._width, len(index))
        return values[: self.shape[1]].T.clone(memory_format=torch.contiguous_format)

    def _values(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zero: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        n = codes.shape[1]
        shape = (self._width // self._block, self._block, n)  # (blocks, block, outputs)
        values = SHARED.take(shape, torch.float32)
        if self.bits == 8:
            values.copy_(codes.view(shape))
        else:
            values.copy_(_nibbles(codes, self._width, n).view(shape))  # 16 times the code
        if zero is not None:
            values.sub_(zero.float() if self.bits == 8 else zero.float() * 16)
        values.mul_(scales.float())
        if dtype == torch.float32:
            return values
        return SHARED.take(shape, dtype).copy_(values)

    def _fill(self, i: int, packed: Packed) -> None:
        start, stop = self.span(i)
        n, half = stop - start, 2 ** (self.bits - 1)
        codes = torch.zeros(n, self._width * self.bits // 8, dtype=torch.uint8)
        stored = torch.tensor(packed.codes[start:stop])
        codes[:, : stored.shape[1]] = stored
        flat = _unpack(codes, self.bits).T ^ half  # (in, outputs)
        if self.bits == 4:
            middle = self._width // 2
            flat = (flat[:middle] & 15) | (flat[middle:] << 4)
        self._codes[i, :, :n] = flat.view(torch.int8)
        scales = torch.tensor(packed.scales[start:stop]).float().T
        self._scales[i, :, 0, :n] = scales if self.bits == 8 else scales / 16
        if self._zero is not None and packed.zero_points is not None:
            zero = _unpack(torch.tensor(packed.zero_points[start:stop]), self.bits)
            zero = zero[:, : packed.blocks].T.to(torch.int16) - half
            self._zero[i, :, 0, :n] = zero.to(torch.int8)


class Int4Linear(nn.Linear):
    """A frozen linear layer over `Tiles`; `weight` dequantizes all of it on each access.

    Takes (..., in) and returns (..., out) in the input's dtype. It is an `nn.Linear` so that
    libraries which look for linear layers find it. The tiles live on the CPU and are no part of
    `state_dict`; `dtype` is what `weight` claims to be. `outputs` (from, to) are those of the
    tiles that are this layer's, by default all.
    """

    def __init__(
        self,
        tiles: Tiles | Packed,
        *,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype,
        outputs: tuple[int, int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.tiles = tiles if isinstance(tiles, Tiles) else Tiles(tiles)
        self.outputs = outputs or (0, self.tiles.shape[0])
        self.out_features = self.outputs[1] - self.outputs[0]
        self.in_features = self.tiles.shape[1]
        self.dtype = dtype
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The whole weight (out, in), dequantized now and not kept."""
        return whole(self.tiles, self.dtype, self.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _TiledMatmul.apply(x, self.tiles, self.outputs)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.tiles.bits}"


class Int4Embedding(nn.Embedding):
    """A frozen embedding over `Tiles`: only the rows asked for are dequantized."""

    def __init__(self, tiles: Tiles, *, like: nn.Embedding, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.tiles, self.dtype = tiles, dtype
        self.num_embeddings, self.embedding_dim = tiles.shape
        self.padding_idx = like.padding_idx

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The whole table (words, hidden), dequantized now and not kept."""
        return whole(self.tiles, self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.tiles.rows(ids.reshape(-1), self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.tiles.bits}"


def joined(matrices: Sequence[Packed]) -> Packed:
    """One matrix of all rows in turn; the matrices differ in their number of rows only."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    zeros = [m.zero_points for m in matrices if m.zero_points is not None]
    return Packed(
        first.bits,
        first.block,
        (sum(m.shape[0] for m in matrices), first.shape[1]),
        np.concatenate([m.codes for m in matrices]),
        np.concatenate([m.scales for m in matrices]),
        np.concatenate(zeros) if zeros else None,
    )


def scales_dtype(packed: Packed) -> torch.dtype:
    """The narrowest type that holds the scales exactly: 16 bits if they were made from 16 bits."""
    scales = torch.tensor(packed.scales).float()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((scales / 16).to(dtype).float() * 16, scales):
            return dtype
    return torch.float32


def whole(tiles: Tiles, dtype: torch.dtype, outputs: tuple[int, int] | None = None) -> torch.Tensor:
    """All of W, (out, in), or its rows from and to, as a new tensor."""
    low, high = outputs or (0, tiles.shape[0])
    result = torch.empty(high - low, tiles.shape[1], dtype=dtype)
    for start, stop, part in tiles.parts((low, high), dtype):
        result[start:stop] = part.T
    return result


class _TiledMatmul(torch.autograd.Function):
    # The weight is frozen, so the backward pass needs neither x nor a dequantized copy: it
    # dequantizes the same tiles a second time.

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tiles: Tiles, outputs: tuple[int, int]) -> torch.Tensor:
        ctx.tiles, ctx.outputs = tiles, outputs
        flat, out = x.reshape(-1, tiles.shape[1]), outputs[1] - outputs[0]  # (tokens, in)
        y: torch.Tensor | None = None
        for start, stop, part in tiles.parts(outputs, x.dtype):
            found = torch.mm(flat, part)
            if stop - start == out:
                y = found
                break
            y = x.new_empty(flat.shape[0], out) if y is None else y
            y[:, start:stop] = found
        assert y is not None
        return y.view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,), tiles, outputs = grads, ctx.tiles, ctx.outputs
        if not ctx.needs_input_grad[0]:
            return None, None, None
        flat = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        total: torch.Tensor | None = None
        for start, stop, part in tiles.parts(outputs, grad.dtype):
            found = torch.mm(flat[:, start:stop], part.T)
            if stop - start == flat.shape[1]:
                total = found
                break
            total = found.float() if total is None else total.add_(found)
        assert total is not None
        return total.to(grad.dtype).view(*grad.shape[:-1], tiles.shape[1]), None, None


def _nibbles(codes: torch.Tensor, width: int, n: int) -> torch.Tensor:
    # Sixteen times each signed code: shifting the low nibble up, masking the high one in place.
    both = SHARED.take((width, n), torch.int8)
    torch.bitwise_left_shift(codes, 4, out=both[: width // 2])
    torch.bitwise_and(codes, -16, out=both[width // 2 :])
    return both


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).view(packed.shape[0], -1)
