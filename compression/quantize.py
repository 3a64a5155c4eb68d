"""Compresses a weight matrix and says what is left of it: integers of few bits, or 2 of 4 values.

Knows matrices, and second moments of a layer's inputs where a method asks for them. Does not know
models, files, or how codes are packed: weights come back as floats that lie on the grid.

`rtn` rounds to the nearest step. `gptq` rounds column by column and lets the columns still to come
make up for each error; the same walk with "keep 2 of 4" instead of a grid is SparseGPT's 2:4.

Sources: Frantar et al. 2022 (arXiv 2210.17323), Algorithm 1; Frantar and Alistarh 2023 (arXiv
2301.00774), Algorithm 1; Sun et al. 2023 (arXiv 2306.11695), equation 1, for `prune_2_4`.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from compression.errors import WeightsError

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[np.floating]

Choose = Callable[[F64, int, F64], F64]
"""(the columns still to come, the first one's number, the factor's diagonal) -> what it becomes."""

DAMPING = 0.01
"""Share of C's mean diagonal added to it before inversion, GPTQ's value."""


def rtn(W: Array, bits: int, *, block: int = 0) -> F64:
    """W (out, in) on the symmetric grid of `bits` bits, one scale per row, or per `block` inputs.

    The grid is -2^(bits-1)..2^(bits-1)-1 with the largest value at its wider end, as ONNX Runtime's
    symmetric MatMulNBits has it.
    """
    values: F64 = np.asarray(W, np.float64)
    return _on_grid(values, _steps(values, bits, block), bits)


def gptq(W: Array, C: F64, bits: int, *, block: int = 0) -> F64:
    """As `rtn`, with later inputs making up for earlier errors; C (in, in) are second moments."""
    values: F64 = np.array(W, np.float64)
    steps = _steps(values, bits, block)
    size = block or W.shape[1]

    def choose(rest: F64, at: int, _: F64) -> F64:
        if at % size == 0 and block:  # a block's scale is that of the values it now has
            width = min(size, W.shape[1] - at)
            steps[:, at : at + width] = _steps(rest[:, :width], bits, 0)
        return _on_grid(rest[:, 0], steps[:, at], bits)

    return _column_by_column(values, C, choose)


def prune_2_4(W: Array, C: F64 | None = None) -> F64:
    """W with the two least of every four neighbouring inputs set to zero.

    Least by |w| alone, or by |w| sqrt(C_ii) when C is given (Wanda).
    """
    W = np.asarray(W, np.float64)
    weight = 1.0 if C is None else np.sqrt(np.maximum(np.diag(C), 0.0))
    return np.where(_best_two(np.abs(W) * weight), W, 0.0)


def sparse_gpt_2_4(W: Array, C: F64) -> F64:
    """As `prune_2_4`, with later inputs making up for what was cut off."""
    values: F64 = np.array(W, np.float64)
    keep = np.zeros(W.shape, bool)

    def choose(rest: F64, at: int, diagonal: F64) -> F64:
        if at % 4 == 0:
            keep[:, at : at + 4] = _best_two(np.abs(rest[:, :4]) / diagonal[at : at + 4])
        return np.where(keep[:, at], rest[:, 0], 0.0)

    return _column_by_column(values, C, choose)


def bits_per_weight(
    shape: tuple[int, int], bits: float, *, block: int = 0, scale: int = 16
) -> float:
    """Stored bits per value: codes plus one scale of `scale` bits per row or block."""
    return bits + scale / (block or shape[1])


def _steps(W: F64, bits: int, block: int) -> F64:
    out, width = W.shape
    if bits not in range(2, 9) or block < 0:
        raise WeightsError(f"{bits} bits in blocks of {block}: choose 2 to 8 bits and a block >= 0")
    size = block or width
    padded = np.pad(W, ((0, 0), (0, -width % size))).reshape(out, -1, size)
    places = np.abs(padded).argmax(axis=2)[..., None]
    largest = np.take_along_axis(padded, places, axis=2)
    step = -largest / 2 ** (bits - 1)  # negative for a positive extreme: that one gets the wide end
    step = np.where(step == 0, 1.0, step)
    return np.asarray(np.repeat(step[..., 0], size, axis=1)[:, :width])


def _on_grid(W: F64, step: F64, bits: int) -> F64:
    codes = np.clip(np.rint(W / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return np.asarray(codes * step)


def _best_two(score: F64) -> npt.NDArray[np.bool_]:
    out, width = score.shape
    if width % 4:
        raise WeightsError(f"2:4 needs a multiple of four inputs, not {width}")
    order = score.reshape(out, -1, 4).argsort(axis=2).argsort(axis=2)
    return np.asarray((order >= 2).reshape(out, width))


def _column_by_column(W: F64, C: F64, choose: Choose) -> F64:
    # GPTQ's walk: the upper Cholesky factor of the inverse of C says how the error of one column is
    # spread over the later ones.
    width = W.shape[1]
    H = (C + C.T) / 2
    H = H + np.eye(width) * max(DAMPING * float(np.diag(H).mean()), np.finfo(np.float64).tiny)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    diagonal = np.diag(U)
    for at in range(width):
        kept = choose(W[:, at:], at, diagonal)
        error = (W[:, at] - kept) / diagonal[at]
        W[:, at] = kept
        W[:, at + 1 :] -= np.outer(error, U[at, at + 1 :])
    return W
