"""How much one update may move the model: bounds on its size and weight, and the robust mean.

Knows sizes, weights and inner products of changes. Does not know factors, devices or rounds.

Four bounds, from cheap to dear (PROTOCOL.md 4.1). Each of them is always on:

1. a change larger than `max_norm` is refused before it counts (`exchange.py`);
2. a device's own count of its examples is believed up to `examples` times the median count;
3. a change above `refuse` times the median is left out, and its sender is told on;
4. a change above `clip` times the median is shortened to that.

The mean of what remains may still be dragged by a device that stays below the bounds. The geometric
median is not, while less than half of the weight is hostile; it costs one matrix of inner products.

Not promised: that a slow back-door under all bounds is noticed, nor anything when more than about
30 % of the devices are hostile. `gate.py` looks at what came out.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

Aggregation = Literal["auto", "mean", "geometric-median"]

LEAST_FOR_MEDIAN = 5
"""With fewer updates "auto" is the mean: of four devices with unlike data each one is needed."""

_TOLERANCE = 1e-12  # relative to the spread of the points; weights are then exact to 1e-9
_MOST_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Rule:
    """How a round's updates become one.

    Attributes:
        aggregation: "mean", "geometric-median" (RFA), or "auto": the latter from LEAST_FOR_MEDIAN
            updates on.
        clip: a change counts at most this many times the median change of the round.
        refuse: one this many times the median is left out and counted as a fault; 0 never.
        max_norm: largest Frobenius norm of a change of all B·A; beyond it, it is refused.
        examples: a device weighs at most this many times the median number of examples.
    """

    aggregation: Aggregation = "mean"
    clip: float = 3.0
    refuse: float = 30.0
    max_norm: float = 1e4
    examples: float = 1.0

    def takes_median(self, updates: int) -> bool:
        """Say whether so many updates are combined by their geometric median."""
        many = self.aggregation == "auto" and updates >= LEAST_FOR_MEDIAN
        return many or self.aggregation == "geometric-median"


def fair_counts(examples: F64, most: float) -> F64:
    """Numbers of examples, (n,), none above `most` times their median."""
    counts = np.maximum(examples, 1.0)
    return np.asarray(np.minimum(counts, most * float(np.median(counts))))


def kept_shares(norms: F64, rule: Rule) -> F64:
    """Share of each change that counts, (n,) in [0, 1], from the norms of changes; 0 is refused.

    The median is over changes that move at all, so devices that did nothing silence nobody.
    """
    moving = norms[norms > 0]
    if moving.size == 0:
        return np.ones_like(norms)
    median = float(np.median(moving))
    shares = np.minimum(1.0, rule.clip * median / np.maximum(norms, np.finfo(np.float64).tiny))
    if rule.refuse > 0:
        shares[norms > rule.refuse * median] = 0.0
    return shares


def geometric_median(gram: F64, weights: F64) -> F64:
    """Weights v (n,), summing to 1, with sum_k v_k x_k = argmin_z sum_k weights_k |z - x_k|.

    `gram`: inner products of the points, (n, n). `weights`: positive, any scale. The points
    themselves are not needed: the median lies among their mixtures.

    Source: Weiszfeld 1937; the test at the points is Vardi and Zhang 2000 (doi
    10.1073/pnas.97.4.1423); for federated updates: Pillutla et al. (RFA, arXiv 1912.13445).
    """
    alpha: F64 = weights / weights.sum()
    square = np.maximum(np.diag(gram)[:, None] + np.diag(gram)[None, :] - 2.0 * gram, 0.0)
    spread = float(np.sqrt(square.max()))
    if spread == 0.0:
        return alpha
    best = int(np.argmin(np.sqrt(square) @ alpha))
    if _point_is_median(best, gram, square, alpha):
        return np.asarray(np.eye(len(alpha))[best])
    v = alpha
    for _ in range(_MOST_STEPS):
        distances = np.sqrt(np.maximum(v @ gram @ v - 2.0 * gram @ v + np.diag(gram), 0.0))
        pull: F64 = alpha / np.maximum(distances, _TOLERANCE * spread)
        new: F64 = pull / pull.sum()
        step = new - v
        v = new
        moved = float(step @ gram @ step)
        if moved <= (_TOLERANCE * spread) ** 2:
            break
    return v


def _point_is_median(k: int, gram: F64, square: F64, alpha: F64) -> bool:
    """Whether point k is the minimum: the others' joint pull does not outweigh its own weight."""
    apart = square[k] > 0.0
    pull = np.zeros_like(alpha)
    pull[apart] = alpha[apart] / np.sqrt(square[k][apart])
    # |sum_i pull_i (x_i - x_k)|, from inner products
    total = pull.sum()
    length = pull @ gram @ pull - 2.0 * total * (gram[k] @ pull) + total**2 * gram[k, k]
    return bool(float(np.sqrt(np.maximum(length, 0.0))) <= float(alpha[~apart].sum()))
