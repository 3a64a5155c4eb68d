"""The moving basis: what the adapter's last changes say about the next update; nothing is sent.

Knows linear algebra and layouts. Does not know quantizers, headers, or how the changes arrived.

Coordinator and devices hold the same last changes of the common adapter, bit for bit, and each
derives the same basis from them. Per tensor G (m, n), as a matrix:

    L = sum of w_t G_t G_t^T,   R = sum of w_t G_t^T G_t        over the last WINDOW changes
    latents of an update U:     Z = Q_L^T U Q_R                  Q_L, Q_R eigenvectors of L, R

Local training works through few directions of a layer's inputs and outputs, the same for all
devices and for some rounds, so a few latents carry what many coordinates did: on the first kind of
work in `examples/bench_codec.py`, a quarter to a third of an update's energy lies in one latent of
a hundred, against a twentieth in one coordinate of a hundred. Eigenvalues say which latents to
expect large; they are coded in classes by that. Before, the update's part along TREND means of the
last changes is sent as one number each.

Long sides keep DIRECTIONS eigenvectors; an orthogonal complement takes the rest, so nothing is out
of reach and the transform is orthonormal.

Source: the Kronecker-factored eigenbasis is Shampoo's (Gupta et al. 2018, arXiv 1802.09568) as used
by SOAP (Vyas et al. 2024, arXiv 2409.11321); as a transform for coding updates it is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from compression import exact
from compression.blocks import F32, Layout, Tensors
from compression.errors import CodecError
from compression.exact import F64

WINDOW = 6
"""Last changes that count."""

WHOLE = 64
"""Sides up to this long, such as the rank, keep all eigenvectors."""

DIRECTIONS = 32
"""Eigenvectors kept of a longer side."""

CLASSES = 8
"""Classes of latents, each twice as large as the one expected to be larger."""

_FADE = 0.9486832980505138  # square root of 0.9: a change counts 0.9 of the next newer one
_FLOOR = 1e-3  # of the mean variance: what a latent without history is expected to have
_WORTH = 1e-4  # of the largest eigenvalue: directions below it are rounding
_SKETCH = 48  # rows that the Gram matrix of a long side is made of
_TRENDS = (0.0, 0.6, 0.85, 1.0)  # a change counts this share of the next newer one


def moves(change: Tensors) -> bool:
    """Whether the change has a value that is not zero."""
    return any(value.any() for value in change.values())


@dataclass(frozen=True)
class MovingBasis:
    """The basis that follows from the last changes of an adapter, oldest first.

    Attributes:
        layout: of the adapter.
        changes: at most WINDOW, at least one not zero, float32 by tensor name.

    Raises:
        CodecError: no change, or none that is not zero.
    """

    layout: Layout
    changes: tuple[Tensors, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.changes) <= WINDOW:
            raise CodecError(f"a moving basis follows 1 to {WINDOW} changes, not {len(self)}")
        if not any(moves(change) for change in self.changes):
            raise CodecError("a moving basis needs a change that is not zero")

    def __len__(self) -> int:
        return len(self.changes)

    @cached_property
    def trend(self) -> F32:
        """Orthonormal directions (k, rows, block), k at most four: fading means of the changes.

        Unlike the rest these may differ in their last bits between machines, and so may what is
        decoded with them; nothing is decided by those bits.
        """
        found: list[F64] = []
        packed = self._packed()
        for fade in _TRENDS:
            mean = np.zeros(packed[0].shape)
            for change in packed:
                mean = fade * mean + change
            size = float(np.linalg.norm(mean))
            for other in found:
                mean -= np.vdot(other, mean) * other
            left = float(np.linalg.norm(mean))
            if left > 1e-3 * size:
                found.append(mean / left)
        return np.array(found, np.float32).reshape(len(found), *packed[0].shape)

    def encode(self, blocks: F32, *, out: F32 | None = None) -> F32:
        """Latents (rows, block) of blocks (rows, block); `out` may be the blocks themselves."""
        return self._transformed(blocks, out, back=False)

    def decode(self, latents: F32, *, out: F32 | None = None) -> F32:
        """Blocks (rows, block) of latents (rows, block); `out` may be the latents themselves."""
        return self._transformed(latents, out, back=True)

    @cached_property
    def classes(self) -> list[npt.NDArray[np.int32]]:
        """Indices into flat latents, CLASSES groups, those expected to be largest first."""
        places, expected = [], []
        for tensor in self._tensors:
            start = tensor.rows.start * self.layout.block
            places.append(np.arange(start, start + tensor.shape[0] * tensor.shape[1]))
            shares = tensor.left.shares[:, None] * tensor.right.shares
            expected.append((tensor.size * shares).reshape(-1))
        order = np.concatenate(places)[np.argsort(-np.concatenate(expected), kind="stable")]
        order = order.astype(np.int32)  # of at most 2^28 values; half of what an index takes
        ends = [len(order) >> (CLASSES - 1 - i) for i in range(CLASSES)]
        return np.split(order, ends[:-1])

    # --- below: private -----------------------------------------------------------------------

    def _packed(self) -> list[F32]:
        return [self.layout.pack(change) for change in self.changes]

    @cached_property
    def _tensors(self) -> "list[_Tensor]":
        weights = np.cumprod([1.0, *[_FADE] * (len(self) - 1)])[::-1]  # one after another: exact
        packed, found, sides = self._packed(), [], []
        for shape, rows in zip(self.layout.matrices, self.layout.tensor_rows, strict=True):
            past = np.stack([_matrix(change, rows, shape) for change in packed])
            whole, scale = exact.integers(past * weights[:, None, None])  # (t, m, n)
            energy = int(np.square(whole.astype(np.int64)).sum())
            size = np.ldexp(float(energy), 2 * scale) / (shape[0] * shape[1])
            found.append((shape, rows, float(size)))
            sides += [_rows_of(whole.transpose(0, 2, 1)), _rows_of(whole)]
        made = iter(_sides(sides))
        return [
            _Tensor(*one, left, right) for one, left, right in zip(found, made, made, strict=True)
        ]

    def _transformed(self, blocks: F32, out: F32 | None, *, back: bool) -> F32:
        out = np.zeros_like(blocks) if out is None else out
        for tensor in self._tensors:
            x = _matrix(blocks, tensor.rows, tensor.shape)
            z = tensor.left.turned(tensor.right.turned(x, back=back).T, back=back).T
            out[tensor.rows].reshape(-1)[: z.size] = z.reshape(-1)
        return out


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as a matrix: its shape, its rows of the layout, its entries' mean energy, sides."""

    shape: tuple[int, int]
    rows: slice
    size: float
    left: "_Side"
    right: "_Side"


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a tensor: an orthogonal matrix Q of its length n, kept small.

    shares (n,): expected energy of each column, 1 on average. Q is `whole` (n, n), or for a long
    side I - W M W^T, whose first columns are the eigenvectors kept.
    """

    shares: F64
    whole: F32 | None = None
    wide: F32 | None = None  # W, (n, p)
    middle: F32 | None = None  # M, (p, p)

    def turned(self, x: F32, *, back: bool) -> F32:
        """x Q, or x Q^T for `back`."""
        if self.whole is not None:
            return np.asarray(x @ (self.whole.T if back else self.whole))
        assert self.wide is not None
        assert self.middle is not None
        middle = self.middle.T if back else self.middle
        return np.asarray(x - ((x @ self.wide) @ middle) @ self.wide.T)


def _sides(parts: Sequence[F64]) -> list[_Side]:
    """The right sides of rows (k, n) of integers; equal sizes are solved together."""
    grams = [rows.T @ rows if rows.shape[1] <= WHOLE else rows @ rows.T for rows in parts]
    solved: dict[int, tuple[F64, F64]] = {}
    for size in {len(gram) for gram in grams}:
        members = [i for i, gram in enumerate(grams) if len(gram) == size]
        values, vectors = exact.symmetric_eigen(np.stack([grams[i] for i in members]))
        solved |= dict(zip(members, zip(values, vectors, strict=True), strict=True))
    return [_side(rows, *solved[i]) for i, rows in enumerate(parts)]


def _side(rows: F64, values: F64, vectors: F64) -> _Side:
    n = rows.shape[1]
    if n <= WHOLE:
        return _Side(_shares(values, n), whole=vectors.astype(np.float32))
    kept = int(np.count_nonzero(values[:DIRECTIONS] > _WORTH * values[0]))
    columns = rows.T @ exact.integers(vectors[:, :kept])[0]  # (n, kept), exact
    wide, middle = _reflector(columns / np.sqrt(np.cumsum(columns * columns, axis=0)[-1]))
    return _Side(_shares(values[:kept], n), wide=wide, middle=middle)


def _reflector(u: F64) -> tuple[F32, F32]:
    """W and M of Q = I - W M W^T, orthogonal, whose first columns are those of U (n, p) up to sign.

    With E the first p columns of I and U_1 the first p rows of U: W = U - E, M = (I - U_1)^-T. That
    Q E = U and Q^T Q = I follows from W^T W = (I - U_1) + (I - U_1)^T.
    """
    p = u.shape[1]
    u = u * _signs(u[:p])
    for _ in range(6):  # Newton-Schulz: U is orthonormal up to the rounding to integers
        u = u @ (1.5 * np.eye(p) - 0.5 * (u.T @ u))
    wide = u.copy()
    wide[:p] -= np.eye(p)
    return wide.astype(np.float32), np.linalg.inv(np.eye(p) - u[:p]).T.astype(np.float32)


def _signs(top: F64) -> F64:
    """Signs S (p,) of U's columns with which I - U_1 S can be inverted, U_1 = `top` (p, p).

    Eliminating U_1 - S with s_j against the sign of what is left of u_jj keeps pivots at 1 or more.

    Source: Ballard et al. 2014, "Reconstructing Householder vectors from TSQR", algorithm 6.
    """
    a, signs = top.copy(), np.empty(len(top))
    for j in range(len(top)):
        signs[j] = -1.0 if a[j, j] >= 0 else 1.0
        below = a[j + 1 :, j] / (a[j, j] - signs[j])
        a[j + 1 :, j + 1 :] -= below[:, None] * a[j, j + 1 :]
    return signs


def _shares(values: F64, n: int) -> F64:
    shares = np.zeros(n)
    shares[: len(values)] = np.maximum(values, 0.0)
    total = float(np.cumsum(shares)[-1])  # one after another: a sum's order is the machine's
    return shares * (n / total) + _FLOOR if total > 0 else np.full(n, _FLOOR)


def _rows_of(whole: F64) -> F64:
    """Rows (k, n) of changes (t, m, n) of integers; of long ones at most _SKETCH, signed sums."""
    t, m, n = whole.shape
    each = max(1, _SKETCH // t)
    if n > WHOLE and m > each:
        whole = _pattern(each, m) @ whole
    return exact.integers(whole.reshape(-1, n))[0]


def _pattern(rows: int, columns: int) -> F64:
    """A fixed pattern of + and - (rows, columns), so that sums of rows lose no direction."""
    i, j = np.arange(columns, dtype=np.uint64) + 1, np.arange(rows, dtype=np.uint64)[:, None]
    bits = (i * (np.uint64(2654435761) + np.uint64(40503) * j) >> np.uint64(13)) & np.uint64(1)
    return np.where(bits == 1, 1.0, -1.0)


def _matrix(blocks: F32, rows: slice, shape: tuple[int, int]) -> F32:
    return blocks[rows].reshape(-1)[: shape[0] * shape[1]].reshape(shape)
