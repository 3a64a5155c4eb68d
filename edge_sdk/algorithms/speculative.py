"""Speculative decoding: a cheap model guesses, the real one checks many guesses in one pass.

Knows distributions over tokens and two callables that give logits. Does not know ONNX, text,
messages or time; `speculation.py` runs it on a device, `coordinator/verifier.py` over a network.

Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding",
arXiv 2211.17192 (ICML 2023). One step of Algorithm 1, in our words:

    1  draft:  for i = 1..g:  q_i = M_q(prefix, x_1..x_{i-1}),  x_i ~ q_i
    2  verify: p_1..p_{g+1} = M_p(prefix), M_p(prefix, x_1), ..  in one pass
    3  accept x_i with probability min(1, p_i(x_i) / q_i(x_i)); n = how many before the first reject
    4  draw one more from norm(max(0, p_{n+1} - q_{n+1})) after a reject, else from p_{g+1}

What comes out, 1 to g + 1 tokens, has M_p's own distribution whatever M_q is.

| paper | here |
|---|---|
| M_p, M_q | `target`, `guesser` (logits); p, q after `Sampling.probabilities` |
| gamma, here g | `length`, tokens in a draft |
| alpha | `alpha`, how likely a drafted token is accepted |
| c | `cost`, time of one M_q run in M_p runs |
| - | `verify_cost[g]` = v(g), time of reading g + 1 tokens in times of reading one |

Differences from the paper. A greedy draft (`q` is None) is one-hot: x is accepted with probability
p(x), and the residual is p without x. That needs nothing but token ids at the verifier. A draft
ends at an end token, and what follows an accepted one is dropped. The paper's Theorem 3.8 assumes
v(g) = 1, which no CPU keeps; `speedup` divides by g c + v(g).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import LocalProtocolError

Tokens = list[int]
F64 = npt.NDArray[np.float64]

Target = Callable[[Sequence[int], int], npt.NDArray[np.floating]]
"""(ids, n) -> logits (n, vocab): what M_p expects after each of the last n prefixes of `ids`."""
Guesser = Callable[[Sequence[int]], npt.NDArray[np.floating]]
"""ids -> logits (vocab,) after `ids`: M_q."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is done to logits before anything is drawn, the same for both models.

    `temperature` 0 takes the likeliest token. `top_k` (0: off) keeps the k likeliest, `top_p` then
    the fewest of them that hold this mass.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def probabilities(self, logits: npt.NDArray[np.floating]) -> F64:
        """Return the distributions of logits (..., vocab), float64, each summing to 1."""
        logits = np.asarray(logits, np.float64)
        if self.temperature == 0:
            return one_hot(logits.argmax(axis=-1), logits.shape[-1])
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            scaled = np.where(_ranks(scaled) < self.top_k, scaled, -np.inf)
        powers = np.exp(scaled)
        shares: F64 = powers / powers.sum(axis=-1, keepdims=True)
        if self.top_p < 1:
            shares = _nucleus(shares, self.top_p)
        return shares


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens x_1..x_g and the distributions (g, vocab) they were drawn from; None if greedy."""

    tokens: Tokens
    q: F64 | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What one step yields: 1 to g + 1 `tokens`, the first `accepted` of them drafted, and how many
    drafted tokens were looked at before that was known."""

    tokens: Tokens
    accepted: int
    looked_at: int


def draft(
    guesser: Guesser,
    prefix: Sequence[int],
    length: int,
    *,
    sampling: Sampling | None = None,
    kept: int = 0,
    rng: np.random.Generator | None = None,
    ends: frozenset[int] = frozenset(),
) -> Draft:
    """Return up to `length` guessed tokens after `prefix`; line 1.

    Without `sampling` the draft is greedy. With it, tokens are drawn with `rng` from the
    standardised distributions, of which `kept` > 0 keeps the likeliest entries: what a verifier is
    sent must be what was drawn from. A draft stops after a token of `ends`.
    """
    tokens: Tokens = []
    rows: list[F64] = []
    for _ in range(length):
        logits = guesser([*prefix, *tokens])
        if sampling is None:
            tokens.append(int(np.argmax(logits)))
        else:
            assert rng is not None, "a sampled draft needs rng"
            rows.append(truncated(sampling.probabilities(logits), kept))
            tokens.append(_draw(rows[-1], rng))
        if tokens[-1] in ends:
            break
    return Draft(tokens, np.array(rows) if rows else None)


def accept(draft: Draft, p: F64, rng: np.random.Generator) -> Step:
    """Return what comes of a draft, given p (g + 1, vocab); lines 3 and 4.

    Raises:
        LocalProtocolError: p or q have another shape, or q gives a drafted token no mass.
    """
    g, q = len(draft.tokens), draft.q
    if p.ndim != 2 or len(p) != g + 1 or (q is not None and q.shape != (g, p.shape[1])):
        shape = None if q is None else q.shape
        raise LocalProtocolError(f"{g} drafted tokens came with p {p.shape} and q {shape}")
    for i, x in enumerate(draft.tokens):
        drawn_with = 1.0 if q is None else q[i, x]
        if not drawn_with > 0:
            raise LocalProtocolError(f"token {x} was drafted and has no mass in its q")
        if rng.random() < p[i, x] / drawn_with:  # line 3; a ratio of 1 or more always holds
            continue
        rest = p[i].copy()
        if q is None:
            rest[x] = 0.0
        else:
            rest = np.maximum(0.0, rest - q[i])
        return Step([*draft.tokens[:i], _draw(rest, rng)], i, i + 1)  # line 4, after a reject
    return Step([*draft.tokens, _draw(p[g], rng)], g, g)


def accept_likeliest(tokens: Sequence[int], best: npt.NDArray[np.integer]) -> Step:
    """Return what `accept` returns at temperature 0, given the target's likeliest tokens (g + 1,).

    Raises:
        LocalProtocolError: another number of them.
    """
    if len(best) != len(tokens) + 1:
        raise LocalProtocolError(f"{len(tokens)} drafted tokens came with {len(best)} rows")
    n = 0
    while n < len(tokens) and tokens[n] == best[n]:
        n += 1
    return Step([*tokens[:n], int(best[n])], n, min(n + 1, len(tokens)))


def verify(
    target: Target,
    prefix: Sequence[int],
    draft: Draft,
    *,
    sampling: Sampling,
    rng: np.random.Generator,
    ends: frozenset[int] = frozenset(),
) -> Step:
    """Return what M_p makes of a draft in one pass; lines 2 to 4. Ends at an accepted end token."""
    p = sampling.probabilities(target([*prefix, *draft.tokens], len(draft.tokens) + 1))
    return ended(accept(draft, p, rng), ends)


def ended(step: Step, ends: frozenset[int]) -> Step:
    """Return `step` without what follows its first end token."""
    for i, token in enumerate(step.tokens):
        if token in ends:
            return Step(step.tokens[: i + 1], min(step.accepted, i + 1), step.looked_at)
    return step


def truncated(q: F64, kept: int) -> F64:
    """Return `q` (..., vocab) with its `kept` likeliest entries, renormalised; 0 keeps all."""
    if not 0 < kept < q.shape[-1]:
        return q
    short = np.where(_ranks(q) < kept, q, 0.0)
    return np.asarray(short / short.sum(axis=-1, keepdims=True), np.float64)


def one_hot(tokens: npt.NDArray[np.integer] | int, vocab: int) -> F64:
    """Return the distributions (..., vocab) that give all mass to `tokens`."""
    return np.asarray(np.arange(vocab) == np.asarray(tokens)[..., None], np.float64)


# --- what to expect (sections 3.1 to 3.4) ---------------------------------------------------------


def overlap(p: F64, q: F64) -> npt.NDArray[np.float64]:
    """Return beta = sum min(p, q) = 1 - TV(p, q) of each row; alpha is its mean.

    Source: Theorem 3.5.
    """
    return np.asarray(np.minimum(p, q).sum(axis=-1), np.float64)


def expected_tokens(alpha: float, length: int) -> float:
    """Return the tokens per target pass, 1 to `length` + 1.

    Source: equation 1, with its limit at alpha = 1.
    """
    return float(sum(alpha**i for i in range(length + 1)))


def speedup(alpha: float, length: int, *, cost: float, verify_cost: float = 1.0) -> float:
    """Return the expected factor over plain decoding; below 1 it loses.

    Source: Theorem 3.8 with v(g) = `verify_cost` in place of 1.

    >>> round(speedup(0.8, 3, cost=0.05), 3)
    2.567
    """
    return expected_tokens(alpha, length) / (length * cost + verify_cost)


def best_length(alpha: float, *, cost: float, verify_cost: Sequence[float]) -> tuple[int, float]:
    """Return g and its factor; (0, 1.0) where no draft wins. `verify_cost[g]` is v(g), from 0 on.

    Source: section 3.4, by trying each g.
    """
    found = (0, 1.0)
    for g in range(1, len(verify_cost)):
        factor = speedup(alpha, g, cost=cost, verify_cost=verify_cost[g])
        if factor > found[1]:
            found = (g, factor)
    return found


def _draw(weights: F64, rng: np.random.Generator) -> int:
    # The highest sum may round below 1 and a draw above it must not fall off the end.
    sums = np.cumsum(weights)
    if not sums[-1] > 0:
        raise LocalProtocolError("nothing can be drawn: the distributions do not fit each other")
    place = np.searchsorted(sums, rng.random() * sums[-1], side="right")
    return int(min(place, np.flatnonzero(weights)[-1]))


def _ranks(values: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
    order = np.argsort(-values, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")


def _nucleus(shares: F64, top_p: float) -> F64:
    order = np.argsort(-shares, axis=-1, kind="stable")
    ordered = np.take_along_axis(shares, order, axis=-1)
    before = np.cumsum(ordered, axis=-1) - ordered
    kept = np.empty_like(shares)
    np.put_along_axis(kept, order, np.where(before < top_p, ordered, 0.0), axis=-1)
    return np.asarray(kept / kept.sum(axis=-1, keepdims=True), np.float64)
