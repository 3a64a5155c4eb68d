"""EoRA: a low-rank branch that gives back, without training, what compression took from a layer.

Knows matrices: a weight's error and the second moments of the layer's inputs. Does not know models,
the order of layers, files, or how the weight was compressed.

Source: Liu et al. 2024 (arXiv 2410.21271), section 3 and Algorithm 1. Per linear layer:

    1  D = W - Wq                                  error (out, in)
    2  C = sum of x x^T over calibration tokens    moment (in, in)
    3  C = Q diag(L) Q^T,  S = Q diag(sqrt L)      root (in, k), S S^T = C
    4  D S ~ U Sigma V^T, the first r               left (out, r)
    5  B = U,  A = Sigma V^T S^-1
    6  y = Wq x + B (A x)

By Eckart and Young no branch of rank r has a smaller output error |(D - BA) X|.

Differences from the paper:

- Line 5 is A = U^T D. Since Sigma V^T = U^T D S, this is the paper's A wherever C has full rank,
  and nothing is divided by an eigenvalue. For inputs outside the calibration's span the paper's
  pseudo-inverse can enlarge an error; here |(I - U U^T) D x| <= |D x| for every x.
- C is the plain sum, in float64, so order does not matter and devices' sums add up to the pooled
  one. Public implementations weigh later batches more.
- Eigenvalues at the level of rounding are dropped. A, B are balanced: as long each, rank by rank.

Plain SVD is the root I (ZeroQuant-V2), Act-S the root diag(sqrt C_ii) (LQER, QERA-approx),
QERA-exact the symmetric root of C: any root with S S^T = C has the same U, hence the same branch.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from compression.errors import WeightsError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Array = npt.NDArray[np.floating]
Moments = dict[str, F64]
Factors = dict[str, F32]

A_SUFFIX, B_SUFFIX = ".lora_A", ".lora_B"
FLOAT64 = float(np.finfo(np.float64).eps)
CHUNK_TOKENS = 4096
"""Rows turned into float64 at once: the copy stays below 100 MB for layers 3,000 wide."""


def second_moment(x: Array) -> F64:
    """C = sum of x x^T over the rows of x (tokens, in): (in, in), symmetric.  Line 2."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, x.shape[0], CHUNK_TOKENS):
        rows = x[start : start + CHUNK_TOKENS].astype(np.float64)
        total += rows.T @ rows
    return total


def merge(parts: Iterable[Mapping[str, F64]]) -> Moments:
    """The sum of several devices' moments, layer by layer; sketches add up in the same way.

    Raises:
        WeightsError: nothing to add, or the parts differ in layers or shapes.
    """
    total: Moments = {}
    for number, part in enumerate(parts):
        if number and part.keys() != total.keys():
            raise WeightsError(f"moments {number} are of other layers than the first ones")
        for name, value in part.items():
            if number and value.shape != total[name].shape:
                raise WeightsError(f"{name}: moments of shape {value.shape}, {total[name].shape}")
            total[name] = total[name] + value if number else np.array(value, np.float64)
    if not total:
        raise WeightsError("no moments to merge; collect some first")
    return total


def eigen_root(moment: F64, *, precision: float = FLOAT64) -> F64:
    """S = Q diag(sqrt L) (in, k) of the k eigenvalues above rounding.  Line 3.

    `precision`: the unit roundoff that `moment` was computed or sent with. Eigenvalues up to
    in * precision * the largest are rounding, so fewer tokens than inputs do no harm.

    Raises:
        WeightsError: not a square matrix of finite numbers.
    """
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or not np.isfinite(moment).all():
        raise WeightsError(f"moments of shape {moment.shape} are not a finite square matrix")
    values, vectors = np.linalg.eigh((moment + moment.T) / 2)
    kept = values > max(float(values[-1]), 0.0) * len(values) * precision
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def diagonal_root(moment: F64) -> F64:
    """diag(sqrt C_ii) (in, in): Act-S, which sees how large inputs are but not how they vary."""
    return np.diag(np.sqrt(np.maximum(np.diag(moment), 0.0)))


def branch(error: Array, rank: int, root: F64 | None = None) -> tuple[F64, F64]:
    """A (rank, in) and B (out, rank) for D = `error` (out, in).  Lines 4 and 5.

    `root`: eigen_root(C) for EoRA, diagonal_root(C) for Act-S, None for plain SVD. Ranks beyond
    what the error has are zero; rank 0 is the empty branch.

    Raises:
        WeightsError: a negative rank, or shapes that do not fit.
    """
    D = np.asarray(error, np.float64)
    if rank < 0 or D.ndim != 2 or (root is not None and root.shape[0] != D.shape[1]):
        shape = None if root is None else root.shape
        raise WeightsError(f"rank {rank}, error {D.shape} and root {shape} do not fit together")
    seen = D if root is None else D @ root
    if not np.isfinite(seen).all():
        raise WeightsError("the weight's error or its root is not finite")
    left, sigma, _ = np.linalg.svd(seen, full_matrices=False)
    left = left[:, :rank] * (sigma[:rank] > 0)
    low = left.T @ D  # (<= rank, in)
    lengths = np.sqrt(np.linalg.norm(low, axis=1))
    A, B = np.zeros((rank, D.shape[1])), np.zeros((D.shape[0], rank))
    A[: len(low)] = low / np.where(lengths > 0, lengths, 1.0)[:, None]
    B[:, : len(low)] = left * lengths
    return A, B


def output_error(error: Array, moment: F64, A: F64 | None = None, B: F64 | None = None) -> float:
    """|(D - BA) X|_F^2, the squared error over all calibration tokens, from C alone."""
    left = np.asarray(error, np.float64)
    if A is not None and B is not None:
        left = left - B @ A
    return float(np.einsum("ij,jk,ik->", left, moment, left, optimize=True))


def one_pass(
    errors: Mapping[str, Array],
    roots: Mapping[str, F64],
    groups: Iterable[Sequence[str]],
    *,
    rank: int,
) -> Factors:
    """The branches of all layers at once: later ones do not know of earlier compensation.

    `groups`: names of layers with the same input; `roots` are by the first name of each.
    """
    return as_factors(
        {name: branch(errors[name], rank, roots[group[0]]) for group in groups for name in group}
    )


def as_factors(branches: Mapping[str, tuple[Array, Array]]) -> Factors:
    """{linear: (A, B)} as an adapter's factors: "<linear>.lora_A", "<linear>.lora_B", float32."""
    factors: Factors = {}
    for name, (A, B) in branches.items():
        factors[name + A_SUFFIX] = A.astype(np.float32)
        factors[name + B_SUFFIX] = B.astype(np.float32)
    return factors


def concatenate(*adapters: tuple[Mapping[str, F32], float]) -> tuple[Factors, int]:
    """One adapter that adds up several: A = [A1; A2], B = [s1 B1, s2 B2].

    Each argument is (factors, scale) with scale = alpha / rank; an EoRA branch has scale 1. Returns
    the factors and their rank; its alpha is that rank. A layer that one adapter lacks is zero in
    its rows.

    Raises:
        WeightsError: an A without its B, or shapes that do not fit together.
    """
    ranks = [_rank(factors) for factors, _ in adapters]
    names = sorted({key.rpartition(".")[0] for factors, _ in adapters for key in factors})
    result: Factors = {}
    for name in names:
        width, height = _sizes(name, [factors for factors, _ in adapters])
        lows, highs = [], []
        for (factors, scale), rank in zip(adapters, ranks, strict=True):
            low = factors.get(name + A_SUFFIX, np.zeros((rank, width), np.float32))
            high = factors.get(name + B_SUFFIX, np.zeros((height, rank), np.float32))
            lows.append(low)
            highs.append(np.float32(scale) * high)
        result[name + A_SUFFIX] = np.concatenate(lows)
        result[name + B_SUFFIX] = np.concatenate(highs, axis=1)
    return result, sum(ranks)


def _rank(factors: Mapping[str, F32]) -> int:
    ranks = {v.shape[0] if k.endswith(A_SUFFIX) else v.shape[1] for k, v in factors.items()}
    if len(ranks) != 1:
        raise WeightsError(f"the factors of one adapter have the ranks {sorted(ranks)}, not one")
    return int(ranks.pop())


def _sizes(name: str, adapters: Sequence[Mapping[str, F32]]) -> tuple[int, int]:
    sizes = set()
    for factors in adapters:
        low, high = factors.get(name + A_SUFFIX), factors.get(name + B_SUFFIX)
        if (low is None) != (high is None):
            raise WeightsError(f"{name}: only one of lora_A and lora_B")
        if low is not None and high is not None:
            sizes.add((low.shape[1], high.shape[0]))
    if len(sizes) != 1:
        raise WeightsError(f"{name}: the adapters are for layers of different sizes {sizes}")
    return sizes.pop()


# ---- federation: what travels instead of C, which is in * in numbers


def probe(name: str, width: int, columns: int, *, seed: int) -> F64:
    """Omega (width, columns): the same orthonormal random directions on every machine."""
    rng = np.random.default_rng([seed, *name.encode()])
    q, _ = np.linalg.qr(rng.standard_normal((width, min(columns, width))))
    return np.asarray(q)


def sketch(moment: F64, omega: F64) -> F64:
    """C Omega (in, columns): linear in C, so devices' sketches add up to the pooled one."""
    return np.asarray(moment @ omega)


def sketch_root(sketched: F64, omega: F64, *, precision: float = FLOAT64) -> F64:
    """A root of Nystroem's approximation Y (Omega^T Y)^+ Y^T of C, from Y = C Omega alone.

    Exact when C has at most as many dimensions as Omega has columns.
    Source: Halko, Martinsson, Tropp 2011 (SIAM Review 53, 217), section 5.5.
    """
    core = omega.T @ sketched
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    kept = values > max(float(values[-1]), 0.0) * len(omega) * precision
    return np.asarray(sketched @ (vectors[:, kept] / np.sqrt(values[kept])))
