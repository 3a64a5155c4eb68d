"""OSCA: which ways of sampling get how many samples of a fixed budget.

Knows success counts, costs and integers. Does not know what a sample is, who draws it or who judges
it; `crosslm.py` asks it how to divide a round's texts over temperatures.

Zhang, Zhou, Wang, Wang, Li: "Scaling LLM Inference with Optimized Sample Compute Allocation"
(OSCA), arXiv 2410.22480, NAACL 2025.

    line 1   p_ij = share of configuration i's samples that solve problem j
    line 2   f(k) = mean_j [ 1 - prod_i (1 - p_ij)^k_i ],  sum_i c_i k_i <= C
    line 3   k = the best of greedy, every single configuration and the uniform one
    line 4   climb: move one sample from one configuration to another while f rises

| paper | here |
|---|---|
| configuration i, problem j | row and column of `good` and `tried` |
| p_ij | `rates`: shrunken, because a cell has few tries |
| C, k | `budget`, `Allocation.samples` |

Differences from the paper: samples have costs c_i, and the budget is a cost; the rates are shrunken
towards their configuration's (line 1), without which few tries overfit; the climb starts from good
allocations instead of a random one, so the result is never below them (line 3). f grows by less
with every further sample, so at equal costs greedy reaches 1 - 1/e of the optimum, and
`Allocation.bound` says how far above any allocation could be.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError

F64 = npt.NDArray[np.float64]

STRENGTH = 4.0
"""Tries that the configuration's own rate counts for in each of its cells."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many samples each configuration draws.

    Attributes:
        samples: k_i, one a configuration.
        value: f(k), the expected share of problems solved at least once, in [0, 1].
        bound: no allocation of the same budget has a higher f.
    """

    samples: tuple[int, ...]
    value: float
    bound: float


def rates(good: npt.ArrayLike, tried: npt.ArrayLike, *, strength: float = STRENGTH) -> F64:
    """Estimated p_ij in (0, 1), (configurations, problems), from counts of that shape.

    A configuration's own rate is (good + 1) / (tried + 2), Laplace's rule over all problems; each
    of its cells is drawn towards it as by `strength` further tries.

    Raises:
        ConfigError: the counts are negative, of different shapes, or more good than tried.

    Source: OSCA, section 3; the shrinkage is ours (PAPERS.md 8 (f)).
    """
    hits, n = np.asarray(good, np.float64), np.asarray(tried, np.float64)
    if hits.shape != n.shape or hits.ndim != 2 or (hits < 0).any() or (hits > n).any():
        raise ConfigError(
            f"counts of shapes {hits.shape} and {n.shape} are not (configurations, problems) with "
            "0 <= good <= tried"
        )
    own = (hits.sum(axis=1, keepdims=True) + 1) / (n.sum(axis=1, keepdims=True) + 2)
    found: F64 = (hits + strength * own) / (n + strength)
    return found


def coverage(p: F64, samples: npt.ArrayLike) -> float:
    """f(k): expected share of problems that at least one sample solves.

    Source: OSCA, section 3.
    """
    k = np.asarray(samples, np.float64)
    return float(1 - np.exp(k @ _log_miss(p)).mean())


def allocate(p: F64, budget: float, *, costs: npt.ArrayLike | None = None) -> Allocation:
    """Divide `budget` over the configurations of `p`; what no sample fits into stays unspent.

    `costs`: of one sample of each configuration, above 0; 1 for all by default.

    Raises:
        ConfigError: a cost that is not above 0, a negative budget, or rates outside [0, 1].

    Source: OSCA, section 3; Nemhauser, Wolsey, Fisher 1978 for the greedy bound.
    """
    c = np.ones(len(p)) if costs is None else np.asarray(costs, np.float64)
    if c.shape != (len(p),) or not (c > 0).all() or budget < 0 or not _are_rates(p):
        raise ConfigError(
            f"a budget of {budget} over {len(p)} configurations needs a cost above 0 for each "
            "and rates in [0, 1]"
        )
    starts = [_uniform(c, budget), _greedy(p, c, budget)]  # line 3
    starts += [_single(c, budget, i) for i in range(len(p))]
    best = max(starts, key=lambda k: round(coverage(p, k), 12))  # of equals the first: all alike
    best = _climb(p, c, budget, best)  # line 4
    value = coverage(p, best)
    steepest = float((_gains(p, best) / c).max(initial=0.0))
    return Allocation(
        tuple(int(n) for n in best), value, min(1.0, value + budget * max(0.0, steepest))
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of 'one of k samples is right' when c of n were.

    Raises:
        ConfigError: not 0 <= c <= n and 0 <= k <= n.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1; OSCA measures with it.
    """
    if not (0 <= c <= n and 0 <= k <= n):
        raise ConfigError(f"pass@{k} of {c} right among {n} samples has no unbiased estimate")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _are_rates(p: F64) -> bool:
    return p.ndim == 2 and p.size > 0 and bool(((p >= 0) & (p <= 1)).all())


def _log_miss(p: F64) -> F64:
    with np.errstate(divide="ignore"):
        log = np.log1p(-p)
    return np.maximum(log, -1e3)  # never -inf: 0 samples of a sure configuration solve nothing


def _gains(p: F64, k: npt.NDArray[np.int64]) -> F64:
    """What one more sample of each configuration adds to f(k)."""
    missed = np.exp(k @ _log_miss(p))  # (problems,)
    gains: F64 = (p * missed).mean(axis=1)
    return gains


def _greedy(p: F64, c: F64, budget: float) -> npt.NDArray[np.int64]:
    k, left = np.zeros(len(p), np.int64), budget
    while (fits := c <= left + 1e-9).any():
        best = int(np.where(fits, _gains(p, k) / c, -1.0).argmax())
        k[best] += 1
        left -= c[best]
    return k


def _single(c: F64, budget: float, i: int) -> npt.NDArray[np.int64]:
    k = np.zeros(len(c), np.int64)
    k[i] = int((budget + 1e-9) // c[i])
    return k


def _uniform(c: F64, budget: float) -> npt.NDArray[np.int64]:
    return np.full(len(c), int((budget + 1e-9) // c.sum()), np.int64)


def _climb(p: F64, c: F64, budget: float, k: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Give up one sample and spend what is free on another configuration, while f rises."""
    value = coverage(p, k)
    moved = True
    while moved:
        moved = False
        for give in np.flatnonzero(k):
            for take in range(len(k)):
                trial = k.copy()
                trial[give] -= 1
                trial[take] += int((budget - trial @ c + 1e-9) // c[take])
                if take != give and (found := coverage(p, trial)) > value + 1e-12:
                    k, value, moved = trial, found, True
                    break
            if moved:
                break
    return k
