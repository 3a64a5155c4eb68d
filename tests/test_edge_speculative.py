"""The accept rule: whatever guesses, what comes out is the target's own."""

import numpy as np
import pytest

from edge_sdk.algorithms.speculative import (
    Draft,
    Sampling,
    Step,
    accept,
    accept_likeliest,
    best_length,
    draft,
    expected_tokens,
    one_hot,
    overlap,
    speedup,
    truncated,
    verify,
)
from edge_sdk.errors import LocalProtocolError

VOCAB = 8
WARM = Sampling(temperature=1.0)


class Markov:
    """A language model that looks at the last token only: logits (V, V)."""

    def __init__(self, seed: int, *, near: "Markov | None" = None, by: float = 1.0) -> None:
        noise = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB))
        self.logits = noise if near is None else near.logits + by * noise

    def next(self, ids):
        return self.logits[ids[-1]]

    def rows(self, ids, n):
        return self.logits[list(ids)[-n:]]


P = Markov(1)
NEAR = Markov(2, near=P, by=0.5)


def greedy(target, prefix, count):
    ids = list(prefix)
    for _ in range(count):
        ids.append(int(target.next(ids).argmax()))
    return ids[len(prefix) :]


def speculated(target, guesser, prefix, count, *, length=3, sampling=WARM, sampled=True, **options):
    rng = np.random.default_rng(options.pop("seed", 0))
    ids, steps = list(prefix), []
    while len(ids) < len(prefix) + count:
        guess = draft(
            guesser.next,
            ids[-1:],
            length,
            sampling=sampling if sampled else None,
            rng=rng,
            **options,
        )
        steps.append(verify(target.rows, ids[-1:], guess, sampling=sampling, rng=rng))
        ids += steps[-1].tokens
    return ids[len(prefix) :], steps


def distance(ids, p):
    """The mean total variation of the transitions of `ids` from the rows of p (V, V), by visits."""
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    assert (counts[p == 0] == 0).all()
    visits = counts.sum(axis=1, keepdims=True)
    return (
        np.abs(counts / visits.clip(min=1) - p * (visits > 0)).sum(axis=1) @ visits / 2 / len(ids)
    )


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("guesser", [P, NEAR, Markov(9), Markov(10, near=P, by=30.0)], ids=id)
@pytest.mark.parametrize("sampled", [True, False])
def test_cold_it_writes_what_the_target_writes_for_any_draft(guesser, length, sampled):
    cold = Sampling()

    ids, steps = speculated(P, guesser, [0], 60, length=length, sampling=cold, sampled=sampled)

    assert ids[:60] == greedy(P, [0], 60)
    assert all(1 <= len(step.tokens) <= length + 1 for step in steps)


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "greedy"])
def test_warm_it_has_the_targets_distribution(sampled):
    p, q = WARM.probabilities(P.logits), WARM.probabilities(NEAR.logits)
    far = 1 - overlap(p, q)
    assert far.min() > 0.06  # the draft alone would be seen in every row
    assert far.max() < 0.35

    ids, _ = speculated(P, NEAR, [0], 30_000, sampled=sampled, seed=5)

    assert distance(ids, p) < 0.02
    assert distance(ids, q) > 0.05


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "greedy"])
def test_each_row_of_the_accept_rule_is_the_targets_to_a_hundredth(sampled):
    p, q = WARM.probabilities(P.logits), WARM.probabilities(NEAR.logits)
    rng = np.random.default_rng(3)
    for state in (0, 3, 6):
        after, found = np.array([p[state], p[0]]), np.zeros(VOCAB)
        drawn = rng.choice(VOCAB, size=60_000, p=q[state])
        for x in drawn if sampled else np.full(60_000, q[state].argmax()):
            guess = Draft([int(x)], q[state][None] if sampled else None)
            found[accept(guess, after, rng).tokens[0]] += 1

        assert np.abs(found / found.sum() - p[state]).sum() / 2 < 0.01


def test_a_truncated_draft_is_exact_when_it_is_drawn_from_what_is_sent():
    p, q = WARM.probabilities(P.logits), truncated(WARM.probabilities(NEAR.logits), 2)
    assert ((q > 0).sum(axis=1) == 2).all()

    ids, _ = speculated(P, NEAR, [0], 30_000, kept=2, seed=6)

    assert distance(ids, p) < 0.02


def test_standardised_alike_both_models_stay_within_top_k_and_top_p():
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.8)
    p = sampling.probabilities(P.logits)

    ids, _ = speculated(P, NEAR, [0], 30_000, sampling=sampling, seed=7)

    assert ((p > 0).sum(axis=1) <= 4).all()
    assert distance(ids, p) < 0.02  # and it checks that nothing outside was drawn


def test_tokens_per_pass_follow_the_formula():
    """With one row for every state the paper's independence holds, so its formula does."""
    same = Markov(1)
    same.logits = np.repeat(P.logits[:1], VOCAB, axis=0)
    near = Markov(1)
    near.logits = np.repeat(NEAR.logits[:1], VOCAB, axis=0)
    alpha = overlap(WARM.probabilities(same.logits[0]), WARM.probabilities(near.logits[0]))

    ids, steps = speculated(same, near, [0], 30_000, length=3, seed=8)

    assert len(ids) / len(steps) == pytest.approx(expected_tokens(float(alpha), 3), rel=0.02)
    looked, taken = sum(s.looked_at for s in steps), sum(s.accepted for s in steps)
    assert taken / looked == pytest.approx(float(alpha), rel=0.02)


def test_a_perfect_guesser_is_always_believed():
    ids, steps = speculated(P, P, [0], 4_000, length=4)

    assert {step.accepted for step in steps} == {4}
    assert len(steps) == len(ids) / 5


def test_a_draft_ends_at_an_end_token_and_nothing_follows_it():
    ends = frozenset({greedy(P, [0], 2)[1]})

    guess = draft(P.next, [0], 5, ends=ends)
    step = verify(P.rows, [0], guess, sampling=Sampling(), rng=np.random.default_rng(0), ends=ends)

    assert len(guess.tokens) == 2
    assert step == Step(greedy(P, [0], 2), 2, 2)


def test_a_target_that_ends_where_the_draft_goes_on_ends():
    end = greedy(P, [0], 1)[0]
    wrong = Draft([(end + 1) % VOCAB, 0, 0])

    step = verify(
        P.rows, [0], wrong, sampling=Sampling(), rng=np.random.default_rng(0), ends=frozenset({end})
    )

    assert step == Step([end], 0, 1)


def test_the_short_way_at_temperature_zero_is_the_rule():
    rng = np.random.default_rng(11)
    for _ in range(200):
        tokens = [int(t) for t in rng.integers(0, 3, rng.integers(0, 5))]
        best = rng.integers(0, 3, len(tokens) + 1)

        assert accept_likeliest(tokens, best) == accept(Draft(tokens), one_hot(best, VOCAB), rng)


def test_no_draft_is_plain_decoding():
    step = verify(P.rows, [0], Draft([]), sampling=Sampling(), rng=np.random.default_rng(0))

    assert step == Step(greedy(P, [0], 1), 0, 0)


@pytest.mark.parametrize(
    ("guess", "rows"),
    [
        (Draft([1, 2]), 2),
        (Draft([1], one_hot(1, VOCAB)), 2),
        (Draft([1], one_hot(np.array([2]), VOCAB)), 2),
    ],
    ids=["too few rows", "q of another shape", "a token q cannot draw"],
)
def test_what_does_not_fit_together_is_refused(guess, rows):
    with pytest.raises(LocalProtocolError, match="draft"):
        accept(guess, np.full((rows, VOCAB), 1 / VOCAB), np.random.default_rng(0))


def test_the_length_that_pays_depends_on_what_verifying_costs():
    free = [1.0] * 9
    dear = [1.0, 1.32, 1.76, 2.13, 2.6]  # a 12.5 M model on one core, int4

    assert expected_tokens(1.0, 3) == 4
    assert best_length(0.8, cost=0.05, verify_cost=free)[0] == 8
    assert best_length(0.8, cost=0.2, verify_cost=free)[0] == 4
    assert best_length(0.65, cost=0.36, verify_cost=dear) == (0, 1.0)
    g, factor = best_length(0.93, cost=0.0, verify_cost=dear)
    assert g == 3
    assert factor == pytest.approx(speedup(0.93, 3, cost=0.0, verify_cost=2.13))
    assert 1.6 < factor < 1.8
