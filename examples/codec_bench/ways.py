"""Ways to make the adapter of the next round of eight clients' factors.

Knows LoRA factors, how a mean of products is factored, and what is trained. Does not know codecs,
rounds or results (`bench_gauge.py`).

The product B A is what the model feels; the pair (A, B) is what devices train, encode and owe.
`factors` averages A and B apart, which keeps coordinates and gets the product wrong. `gauge of the
mean` is our way: the mean of products, factored again beside the mean A; `gauge` does that beside
the old A. `balanced` factors the same mean as U sqrt(S), sqrt(S) V^T, which turns
coordinates from round to round; `turned back` undoes the turn as far as a rotation can. `frozen A`
trains and sends B alone, where the mean of B is exact.

Source: `coordinator/aggregate.py`; FFA-LoRA (Sun et al. 2024, arXiv 2403.12313).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from coordinator.aggregate import A_SUFFIX, refactor
from examples.codec_bench.fleet import F32, Leaves, Task

F64 = npt.NDArray[np.float64]
Thin = tuple[F64, F64]
"""A matrix as left (out, k) times right (k, in)."""
Refactor = Callable[[F64, F64, F64, F64], Thin]
"""From left, right, the old A (r, in) and the old B (out, r) to the new B and A."""

_NO_ENERGY = 1e-12  # of a product's largest singular value


def in_the_old_gauge(left: F64, right: F64, A: F64, B: F64) -> Thin:
    """As near to the old A as the mean's row space allows."""
    B_new, A_new, _, _ = refactor(left, right, A)
    return B_new, A_new


def in_the_means_gauge(left: F64, right: F64, A: F64, B: F64) -> Thin:
    """Our way: beside the mean of the clients' A, which may grow as they let it grow."""
    return in_the_old_gauge(left, right, right.reshape(-1, *A.shape).mean(axis=0), B)


def balanced(left: F64, right: F64, A: F64, B: F64) -> Thin:
    """B = U sqrt(S), A = sqrt(S) V^T; what the product leaves open keeps the old A's directions."""
    r = len(A)
    Q_left, R_left = np.linalg.qr(left)
    Q_right, R_right = np.linalg.qr(right.T)
    U, S, Vt = np.linalg.svd(R_left @ R_right.T)
    q = int(np.sum(S[:r] > _NO_ENERGY * S[0])) if S[0] > 0 else 0
    root = np.sqrt(S[:q])
    B_new = np.zeros((len(left), r))
    B_new[:, :q] = (Q_left @ U[:, :q]) * root
    V = Q_right @ Vt[:q].T  # (in, q)
    _, sizes, rest = np.linalg.svd(A - (A @ V) @ V.T, full_matrices=False)
    A_new = np.concatenate([root[:, None] * V.T, sizes[: r - q, None] * rest[: r - q]])
    return B_new, A_new


def balanced_turned_back(left: F64, right: F64, A: F64, B: F64) -> Thin:
    """The same, turned by the r x r rotation that brings it nearest to the old pair."""
    B_new, A_new = balanced(left, right, A, B)
    X, _, Yt = np.linalg.svd(B_new.T @ B + A_new @ A.T)
    return B_new @ (X @ Yt), (X @ Yt).T @ A_new


@dataclass(frozen=True, slots=True)
class Way:
    """How eight updates become the adapter of the next round.

    Attributes:
        refactor: of the mean of products; None: the mean of each factor.
        frozen: A stays as it was drawn; only B is trained and sent.
        faster: times the work's learning rate.
    """

    refactor: Refactor | None = None
    frozen: bool = False
    faster: float = 1.0


WAYS = {
    "factors": Way(),
    "gauge": Way(in_the_old_gauge),
    "gauge of the mean": Way(in_the_means_gauge),
    "balanced": Way(balanced),
    "balanced, turned back": Way(balanced_turned_back),
    "frozen A": Way(frozen=True),
    "frozen A, lr x2": Way(frozen=True, faster=2.0),
}


class Trained:
    """A `Task` as one way trains it: its rate, its steps, and A held fixed where it is frozen."""

    def __init__(self, task: Task, way: Way, seed: int, steps: int) -> None:
        self._task, self.name, self.dtype = task, task.name, task.dtype
        lr = way.faster * task.settings.lr
        self.settings = dataclasses.replace(task.settings, lr=lr, steps=steps)
        start = task.initial(seed)
        self.fixed = {n: v for n, v in start.items() if way.frozen and n.endswith(A_SUFFIX)}
        self.shapes = {n: s for n, s in task.shapes.items() if n not in self.fixed}
        self._leaves = {n: torch.from_numpy(v).to(task.dtype) for n, v in self.fixed.items()}

    def initial(self, seed: int) -> dict[str, F32]:
        """As `Task.initial`, of what is trained."""
        return {n: v for n, v in self._task.initial(seed).items() if n in self.shapes}

    def rows_of(self, seed: int) -> Sequence[npt.NDArray[np.int64]]:
        """As `Task.rows_of`."""
        return self._task.rows_of(seed)

    def loss(self, leaves: Leaves, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """As `Task.loss`."""
        return self._task.loss(self._with_fixed(leaves, len(rows)), rows)

    def held_out_loss(self, leaves: Leaves) -> float:
        """As `Task.held_out_loss`."""
        return self._task.held_out_loss(self._with_fixed(leaves, 1))

    def _with_fixed(self, leaves: Leaves, clients: int) -> Leaves:
        return leaves | {n: v.expand(clients, *v.shape) for n, v in self._leaves.items()}
