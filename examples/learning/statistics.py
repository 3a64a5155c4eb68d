"""Paired comparisons over few seeds: paired t, exact sign flips, Holm's correction.

Knows lists of numbers. Does not know what they measure. Needs no scipy.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paired:
    """Differences a - b over n pairs: their mean and standard deviation, and two-sided p-values.

    `p_flip` cannot fall below 2/2^n: with five seeds 0.0625, whatever the data.
    """

    n: int
    mean: float
    deviation: float
    p_t: float
    p_flip: float


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; not a number for none."""
    return math.fsum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); 0 for fewer than two."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare `a` with `b`, pair by pair."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n, middle, spread = len(differences), mean(differences), deviation(differences)
    if n < 2 or all(d == 0 for d in differences):
        p_t = 1.0
    elif spread == 0:
        p_t = 0.0
    else:
        p_t = t_two_sided(middle / (spread / math.sqrt(n)), n - 1)
    return Paired(n, middle, spread, p_t, sign_flip(differences))


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided permutation test: the share of all sign patterns whose mean is at least as
    far from 0 as the one seen."""
    if not differences:
        return 1.0
    seen = abs(math.fsum(differences))
    extreme = total = 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        total += 1
        flipped = math.fsum(s * d for s, d in zip(signs, differences, strict=True))
        extreme += abs(flipped) >= seen - 1e-12
    return extreme / total


def t_two_sided(t: float, degrees: int) -> float:
    """P(|T| >= |t|) for Student's t with whole `degrees` of freedom.

    Source: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4 (closed sums, no approximation).
    """
    angle = math.atan2(abs(t), math.sqrt(degrees))
    sin, cos = math.sin(angle), math.cos(angle)
    term, total = 1.0, 0.0
    if degrees % 2:  # A = 2/pi (angle + sin (cos + 2/3 cos^3 + ... up to cos^(degrees-2)))
        term = cos
        for k in range(1, degrees - 1, 2):
            total += term
            term *= cos * cos * (k + 1) / (k + 2)
        within = 2 / math.pi * (angle + sin * total)
    else:  # A = sin (1 + 1/2 cos^2 + 3/8 cos^4 + ... up to cos^(degrees-2))
        for k in range(0, degrees - 1, 2):
            total += term
            term *= cos * cos * (k + 1) / (k + 2)
        within = sin * total
    return max(0.0, 1.0 - within)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted
