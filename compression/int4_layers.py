"""Torch layers over weights that stay in 4 or 8 bits, dequantized again for every use.

Knows torch and `Packed`. Does not know models, files, LoRA or training.

The values are those of `Packed.dequantize`, bit for bit, then rounded to the input's dtype. What
costs time is not arithmetic but passes over memory with short inner loops, so the codes are laid
out anew when a layer is made: transposed, (in, out), where a block's scales are one long row; two
rows that lie half a matrix apart share a byte, so that unpacking is two whole-array operations; and
everything is written into one scratch memory that all layers share.
"""

import math
import threading
from typing import Any

import torch
from torch import nn

from compression.int4 import Packed

TILE_WEIGHTS = 2**20
"""Weights dequantized at once: 7 MiB of scratch, and pieces that BLAS still multiplies well."""

COLUMNS_STEP = 16
"""Tiles are a multiple of this wide, the floats in a vector register."""


class Scratch(threading.local):
    """Memory for one dequantized tile, made at first use, grown as needed, one per thread."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, torch.Tensor] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `shape` with undefined values; the next call of this dtype overwrites it."""
        n = math.prod(shape)
        held = self._held.get(dtype)
        if held is None or held.numel() < n:
            held = self._held[dtype] = torch.empty(n, dtype=dtype)
        return held[:n].view(shape)


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
        kept = scales_dtype(packed)
        self._scales = torch.zeros(self.count, packed.blocks, 1, self.columns, dtype=kept)
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
        zero = None if self._zero is None else self._zero[i]
        values = self._values(self._codes[i], self._scales[i], zero, dtype)
        start, stop = self.span(i)
        return values.view(shape)[: self.shape[1], : stop - start]

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
    `state_dict`; `dtype` is what `weight` claims to be.
    """

    def __init__(
        self, tiles: Tiles | Packed, *, bias: nn.Parameter | None = None, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.tiles = tiles if isinstance(tiles, Tiles) else Tiles(tiles)
        self.out_features, self.in_features = self.tiles.shape
        self.dtype = dtype
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The whole weight (out, in), dequantized now and not kept."""
        return whole(self.tiles, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _TiledMatmul.apply(x, self.tiles)
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


def scales_dtype(packed: Packed) -> torch.dtype:
    """The narrowest type that holds the scales exactly.

    ONNX Runtime's quantizer takes a block's largest weight over a power of two, so the scales of a
    16-bit checkpoint have 16 bits.
    """
    scales = torch.tensor(packed.scales).float()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((scales / 16).to(dtype).float() * 16, scales):
            return dtype
    return torch.float32


def whole(tiles: Tiles, dtype: torch.dtype) -> torch.Tensor:
    """All of W, (out, in), as a new tensor."""
    result = torch.empty(tiles.shape, dtype=dtype)
    for i in range(tiles.count):
        start, stop = tiles.span(i)
        result[start:stop] = tiles.tile(i, dtype).T
    return result


class _TiledMatmul(torch.autograd.Function):
    # The weight is frozen, so the backward pass needs neither x nor a dequantized copy: it
    # dequantizes the same tiles a second time.

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        ctx.tiles = tiles
        out, width = tiles.shape
        flat = x.reshape(-1, width)  # (tokens, in)
        if tiles.count == 1:
            return torch.mm(flat, tiles.tile(0, x.dtype)).view(*x.shape[:-1], out)
        y = x.new_empty(flat.shape[0], out)
        for i in range(tiles.count):
            start, stop = tiles.span(i)
            y[:, start:stop] = torch.mm(flat, tiles.tile(i, x.dtype))
        return y.view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        (grad,), tiles = grads, ctx.tiles
        if not ctx.needs_input_grad[0]:
            return None, None
        out, width = tiles.shape
        flat = grad.reshape(-1, out)  # (tokens, out)
        if tiles.count == 1:
            total = torch.mm(flat, tiles.tile(0, grad.dtype).T)
        else:
            total = grad.new_zeros(flat.shape[0], width, dtype=torch.float32)
            for i in range(tiles.count):
                start, stop = tiles.span(i)
                total += torch.mm(flat[:, start:stop], tiles.tile(i, grad.dtype).T)
        return total.to(grad.dtype).view(*grad.shape[:-1], width), None


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
