"""Linear algebra whose every bit is the same on every machine. Knows numpy; knows no codec.

A basis that two sides derive for themselves must be the same basis. LAPACK promises no such thing:
sums run in an order that the machine chooses, and where eigenvalues are close, a last bit decides
which vectors come out. Two means avoid it: products of integers that float64 holds exactly, in
whatever order they are summed; and Jacobi's rotations by elementwise operations, which IEEE 754
defines to the last bit.
"""

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

ROW_BITS = 16
"""Bits of an integer: sums of up to 2^21 products of two such fit float64's 53 bits."""

_SWEEPS = 6  # of Jacobi, which converges quadratically; what is left is the same everywhere


def integers(values: F64) -> tuple[F64, int]:
    """Integers of at most ROW_BITS bits, as float64, and e: values are about integers * 2^e.

    All zero stays all zero.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0:
        return np.zeros_like(values), 0
    _, exponent = np.frexp(largest)  # largest < 2^exponent
    scale = int(exponent) - ROW_BITS
    return np.rint(np.ldexp(values, -scale)), scale


def symmetric_eigen(matrices: F64) -> tuple[F64, F64]:
    """Eigenvalues (t, n), largest first, and eigenvectors (t, n, n) in columns, of symmetric ones.

    By cyclic Jacobi with disjoint pairs rotated together (Golub and Van Loan, section 8.5).
    """
    t, size, _ = matrices.shape
    n = size + size % 2  # an odd one gets a row of zeros, whose pair does not turn
    a = np.zeros((t, n, n))
    a[:, :size, :size] = matrices
    v = np.broadcast_to(np.eye(n), (t, n, n)).copy()  # rows are the vectors
    for left, right in _rounds(n) * _SWEEPS:
        cos, sin = _rotation(a[:, left, left], a[:, right, right], a[:, left, right])
        _turn(a, left, right, cos, sin)
        _turn(a.transpose(0, 2, 1), left, right, cos, sin)
        _turn(v, left, right, cos, sin)
    values = np.diagonal(a, axis1=1, axis2=2)[:, :size]
    order = np.argsort(-values, axis=1, kind="stable")
    vectors = np.take_along_axis(v[:, :size, :size], order[:, :, None], axis=1)
    return np.take_along_axis(values, order, axis=1), vectors.transpose(0, 2, 1)


def _rotation(first: F64, second: F64, beside: F64) -> tuple[F64, F64]:
    """Cosines and sines that make the entries `beside` the diagonal zero."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        tau = (second - first) / (2.0 * beside)
        tangent = np.where(tau < 0, -1.0, 1.0) / (np.abs(tau) + np.sqrt(1.0 + tau * tau))
    tangent = np.where(beside == 0.0, 0.0, tangent)
    cos = 1.0 / np.sqrt(1.0 + tangent * tangent)
    return cos, tangent * cos


def _turn(a: F64, left: Indices, right: Indices, cos: F64, sin: F64) -> None:
    """Rotate pairs of rows, in place."""
    x, y = a[:, left], a[:, right]
    a[:, left] = cos[:, :, None] * x - sin[:, :, None] * y
    a[:, right] = sin[:, :, None] * x + cos[:, :, None] * y


def _rounds(n: int) -> list[tuple[Indices, Indices]]:
    """All pairs of 0..n-1 in n - 1 rounds of n / 2 disjoint ones: a round-robin tournament."""
    seats = np.arange(n)
    found = []
    for _ in range(n - 1):
        found.append((seats[: n // 2].copy(), seats[: n // 2 - 1 : -1].copy()))
        seats = np.concatenate([seats[:1], seats[-1:], seats[1:-1]])
    return found
