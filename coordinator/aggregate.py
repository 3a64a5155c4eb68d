"""Adds up what devices learned: mean of the products B·A, factored again at the same rank.

Knows LoRA factors as arrays and the weights of contributions. Does not know models, codecs,
messages or rounds; how much one contribution may count is decided in `robust.py`.

Averaging A and B apart is wrong by (1/K) sum_k (B_k - mean B)(A_k - mean A) (PAPERS.md 9.4), so
the products are averaged. The new factors span the best rank-r approximation of the mean, written
in the gauge of the mean A: A' spans the mean's right singular subspace, has the mean A's singular
values and lies as near to it as those two allow; B' is what makes B'A' exact. A device's
error-feedback residue, kept in factor space, so stays meaningful, and A has the size that training
gave it. (Beside the old A it learned less at any rate: `examples/bench_gauge.py`.)
(A's plain projection does not: it loses size where the mean has turned away from A, and B grows to
make up for it. In three rounds B's entries went from 0.1 to 26 and training fell apart.)
No dense (out, in) matrix is ever formed: products are handled as stacked thin factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coordinator.robust import Rule, fair_counts, geometric_median, kept_shares
from edge_sdk.errors import LocalProtocolError, RemoteProtocolError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Factors = Mapping[str, F32]

A_SUFFIX, B_SUFFIX = ".lora_A", ".lora_B"

STALENESS_POWER = 0.5
"""a of s(tau) = (1+tau)^-a; FedAsync (arXiv 1903.03934) uses 0.5."""

FLATTEST = 0.05
"""A's singular values count at least as this share of its largest, so that B' stays bounded."""

_RULE = Rule()
_RANK_TOLERANCE = 1e-6  # relative to the largest singular value; factors arrive in 32 bits


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one device made of `base`: absolute factors, its number of examples, its staleness.

    `base` are the factors it started from; None when they are the present ones.
    """

    device: str
    factors: Factors
    examples: int
    staleness: int = 0
    base: Factors | None = None


@dataclass(frozen=True, slots=True)
class Aggregate:
    """New factors and what to know about them.

    Attributes:
        factors: float32, same layout as before.
        weights: by device, summing to 1; 0 for those left out.
        clipped: by device, the share of its change that was kept (only those below 1).
        outliers: device -> why its change was left out altogether.
        discarded: share of the mean product's energy that rank r could not hold.
    """

    factors: dict[str, F32]
    weights: dict[str, float]
    clipped: dict[str, float]
    discarded: float
    outliers: dict[str, str]


def staleness_weight(staleness: int, power: float = STALENESS_POWER) -> float:
    """s(tau) = (1 + tau)^-a, in (0, 1].  Source: FedAsync, section 5.2; PAPERS.md 10.1."""
    return float((1.0 + staleness) ** -power)


def aggregate(
    current: Factors,
    contributions: Sequence[Contribution],
    *,
    power: float = STALENESS_POWER,
    rule: Rule = _RULE,
) -> Aggregate:
    """P + sum_k w_k c_k (B_k A_k - base product of k), factored again at the present rank.

    For the mean, w_k is proportional to examples_k s(staleness_k); c_k <= 1 shortens a change to
    the rule's bound. With fresh contributions and nothing clipped this is the weighted mean of
    products. For the geometric median of the shortened changes, those w_k are its weights.

    Raises:
        RemoteProtocolError: a contribution has wrong names or shapes, or a value that is not
            finite; the message names device and factor.
        LocalProtocolError: no contributions.
    """
    if not contributions:
        raise LocalProtocolError("nothing to aggregate; ask for at least one update")
    ordered = sorted(contributions, key=lambda c: (c.device, c.staleness))
    for one in ordered:
        check_factors(one.device, one.factors, current)
    counts = fair_counts(np.array([float(c.examples) for c in ordered]), rule.examples)
    raw = counts * np.array([staleness_weight(c.staleness, power) for c in ordered])
    norms = np.array([change_norm(c.factors, c.base or current) for c in ordered])
    kept = kept_shares(norms, rule)
    raw = np.where(kept > 0.0, raw, 0.0)
    inside = np.flatnonzero(raw)
    if rule.takes_median(len(inside)):
        gram = change_gram([ordered[i] for i in inside], current)
        gram *= np.outer(kept[inside], kept[inside])
        raw[inside] = geometric_median(gram, raw[inside])
    weights = raw / raw.sum()
    factors: dict[str, F32] = {}
    lost = total = 0.0
    for slot in slots(current):
        left, right = _stack(slot, current, ordered, weights * kept)
        A = _mean_input(slot, current, ordered, weights * kept)
        B_new, A_new, gone, energy = refactor(left, right, A)
        factors[slot + A_SUFFIX] = A_new.astype(np.float32)
        factors[slot + B_SUFFIX] = B_new.astype(np.float32)
        lost, total = lost + gone, total + energy
    return Aggregate(
        factors=dict(sorted(factors.items())),
        weights=_by_device(ordered, weights),
        clipped={c.device: float(k) for c, k in zip(ordered, kept, strict=True) if k < 1.0},
        discarded=lost / total if total > 0 else 0.0,
        outliers={
            c.device: f"a change of {norm:.3g}, over {rule.refuse:g} times the round's median"
            for c, norm, share in zip(ordered, norms, kept, strict=True)
            if share == 0.0
        },
    )


def slots(factors: Factors) -> list[str]:
    """Names of the adapted layers, sorted."""
    return sorted(key[: -len(A_SUFFIX)] for key in factors if key.endswith(A_SUFFIX))


def check_factors(device: str, factors: Factors, like: Factors) -> None:
    """Refuse factors that cannot be added to `like`.

    Raises:
        RemoteProtocolError: names device and factor.
    """
    for key in sorted(set(factors) ^ set(like)):
        where = "an unknown" if key in factors else "no"
        raise RemoteProtocolError(
            f"device {device} sent {where} factor {key}; its update is left out"
        )
    for key, value in factors.items():
        if value.shape != like[key].shape:
            raise RemoteProtocolError(
                f"device {device} sent factor {key} of shape {value.shape}, "
                f"expected {like[key].shape}; its update is left out"
            )
        if not np.isfinite(value).all():
            raise RemoteProtocolError(
                f"device {device} sent factor {key} with values that are not finite; "
                f"its update is left out"
            )


def change_norm(new: Factors, old: Factors) -> float:
    """Frobenius norm of all layers' B·A minus the old B·A, from the thin factors."""
    square = 0.0
    for slot in slots(new):
        left = np.concatenate([new[slot + B_SUFFIX], -old[slot + B_SUFFIX]], axis=1)
        right = np.concatenate([new[slot + A_SUFFIX], old[slot + A_SUFFIX]], axis=0)
        _, R_left = np.linalg.qr(left.astype(np.float64))
        _, R_right = np.linalg.qr(right.T.astype(np.float64))
        square += float(np.sum((R_left @ R_right.T) ** 2))
    return float(np.sqrt(square))


def change_gram(contributions: Sequence[Contribution], current: Factors) -> F64:
    """Inner products of the changes of all layers' B·A, (n, n), from the thin factors."""
    gram = np.zeros((len(contributions), len(contributions)))
    for slot in slots(current):
        lefts, rights = [], []
        for one in contributions:
            base = one.base or current
            new_B, old_B = one.factors[slot + B_SUFFIX], base[slot + B_SUFFIX]
            new_A, old_A = one.factors[slot + A_SUFFIX], base[slot + A_SUFFIX]
            lefts.append(np.concatenate([new_B, -old_B], axis=1).astype(np.float64))
            rights.append(np.concatenate([new_A, old_A], axis=0).astype(np.float64))
        for i in range(len(contributions)):
            for k in range(i + 1):
                gram[i, k] += np.sum((lefts[i].T @ lefts[k]) * (rights[i] @ rights[k].T))
    return np.asarray(np.tril(gram) + np.tril(gram, -1).T)


def refactor(left: F64, right: F64, A: F64) -> tuple[F64, F64, float, float]:
    """Factor P = left @ right, (out, in), at the rank r of A (r, in), in the gauge of A.

    Returns B' (out, r), A' (r, in), the energy of P that was lost, and the energy of P. B'A' is the
    best rank-r approximation of P (Eckart-Young). A' = X S Y^T V^T, where V spans P's right
    singular subspace, X and Y are the singular vectors of A V, and S the singular values of A.
    """
    r = A.shape[0]
    Q_left, R_left = np.linalg.qr(left)
    Q_right, R_right = np.linalg.qr(right.T)
    U, S, Vt = np.linalg.svd(R_left @ R_right.T)
    S = S[: min(U.shape[1], Vt.shape[0])]
    energy = float(np.sum(S**2))
    q = int(np.sum(S[:r] > _RANK_TOLERANCE * S[0])) if S.size and S[0] > 0 else 0
    if q == 0:
        return np.zeros((left.shape[0], r)), A.copy(), 0.0, 0.0
    U_S = (Q_left @ U[:, :q]) * S[:q]  # (out, q)
    V = Q_right @ Vt[:q].T  # (in, q)
    if q < r:  # P has lower rank: keep the directions of A that P leaves open
        _, _, rest = np.linalg.svd(A - (A @ V) @ V.T, full_matrices=False)
        V = np.concatenate([V, rest[: r - q].T], axis=1)
        U_S = np.concatenate([U_S, np.zeros((left.shape[0], r - q))], axis=1)
    X, _, Yt = np.linalg.svd(A @ V)  # (r, r) each
    sizes = np.linalg.svd(A, compute_uv=False)
    sizes = np.maximum(sizes, FLATTEST * sizes[0])
    A_new = (X * sizes) @ Yt @ V.T
    B_new = (U_S @ Yt.T / sizes) @ X.T
    return B_new, A_new, float(np.sum(S[r:] ** 2)), energy


def _stack(
    slot: str, current: Factors, contributions: Sequence[Contribution], shares: F64
) -> tuple[F64, F64]:
    lefts: list[npt.NDArray[np.floating]] = []
    rights: list[npt.NDArray[np.floating]] = []

    def put(share: float, factors: Factors) -> None:
        if share != 0.0:
            lefts.append(share * factors[slot + B_SUFFIX].astype(np.float64))
            rights.append(factors[slot + A_SUFFIX].astype(np.float64))

    own = 1.0
    for one, share in zip(contributions, shares, strict=True):
        put(float(share), one.factors)
        if one.base is None:
            own -= float(share)
        else:
            put(-float(share), one.base)
    put(own if abs(own) > 1e-12 else 0.0, current)
    return np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)


def _mean_input(
    slot: str, current: Factors, contributions: Sequence[Contribution], shares: F64
) -> F64:
    """The present A (r, in) and the contributions' changes of it, by their shares."""
    mean: F64 = current[slot + A_SUFFIX].astype(np.float64)
    for one, share in zip(contributions, shares, strict=True):
        base = one.base or current
        mean += share * (one.factors[slot + A_SUFFIX].astype(np.float64) - base[slot + A_SUFFIX])
    return mean


def _by_device(contributions: Sequence[Contribution], weights: F64) -> dict[str, float]:
    result: dict[str, float] = {}
    for one, weight in zip(contributions, weights, strict=True):
        result[one.device] = result.get(one.device, 0.0) + float(weight)
    return result
