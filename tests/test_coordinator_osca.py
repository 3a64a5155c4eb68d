"""OSCA against brute force, and its estimators against their definitions."""

import itertools

import numpy as np
import pytest

from coordinator.algorithms.osca import allocate, coverage, pass_at_k, rates
from edge_sdk.errors import ConfigError


def tables(n: int, *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        rng.beta(0.4, 1.2, (int(rng.integers(2, 5)), int(rng.integers(1, 7)))) for _ in range(n)
    ]


def brute_force(p: np.ndarray, budget: int, costs: np.ndarray) -> float:
    counts = [range(int(budget // c) + 1) for c in costs]
    fitting = (k for k in itertools.product(*counts) if np.dot(k, costs) <= budget)
    return max(coverage(p, k) for k in fitting)


@pytest.mark.parametrize("costs", ["equal", "unequal"])
def test_an_allocation_is_near_the_best_there_is_and_never_beyond_its_bound(costs: str) -> None:
    rng = np.random.default_rng(1)
    for p in tables(40):
        c = np.ones(len(p)) if costs == "equal" else rng.integers(1, 4, len(p)).astype(float)
        best = brute_force(p, 5, c)

        found = allocate(p, 5, costs=c)

        assert np.dot(found.samples, c) <= 5
        assert 0.632 * best <= found.value <= best + 1e-12
        assert found.bound >= best - 1e-12
        assert found.value == pytest.approx(coverage(p, found.samples))


def test_an_allocation_is_never_below_one_configuration_alone_nor_all_alike() -> None:
    for p in tables(40, seed=2):
        budget = 3 * len(p)
        alone = [np.eye(len(p), dtype=int)[i] * budget for i in range(len(p))]

        found = allocate(p, budget).value

        assert found >= max(coverage(p, k) for k in [*alone, np.full(len(p), 3)]) - 1e-12


def test_two_specialists_share_the_budget() -> None:
    p = np.array([[0.5, 0.0], [0.0, 0.5], [0.2, 0.2]])

    assert allocate(p, 4).samples == (2, 2, 0)


def test_a_cheap_configuration_is_preferred_at_equal_rates() -> None:
    p = np.array([[0.3, 0.3], [0.3, 0.3]])

    assert allocate(p, 8, costs=[4.0, 1.0]).samples == (0, 8)


def test_one_more_sample_adds_less_and_less() -> None:
    rng = np.random.default_rng(3)
    for p in tables(40, seed=4):
        small = rng.integers(0, 4, len(p))
        large = small + rng.integers(0, 3, len(p))
        for one in np.eye(len(p), dtype=int):
            gain_early = coverage(p, small + one) - coverage(p, small)
            gain_late = coverage(p, large + one) - coverage(p, large)
            assert gain_early >= gain_late - 1e-12 >= -2e-12


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 5, 2), (4, 4, 4)]:
        right = [i < c for i in range(n)]
        subsets = list(itertools.combinations(range(n), k))
        mean = sum(any(right[i] for i in s) for s in subsets) / len(subsets)

        assert pass_at_k(n, c, k) == pytest.approx(mean)


def test_rates_of_few_tries_stay_near_their_configuration() -> None:
    good, tried = np.array([[1, 0, 30]]), np.array([[1, 0, 60]])

    found = rates(good, tried)[0]

    own = 32 / 63
    assert found[0] == pytest.approx((1 + 4 * own) / 5)  # one lucky try is not certainty
    assert found[1] == pytest.approx(own)
    assert found[2] == pytest.approx(0.5, abs=0.01)


def test_shrunken_rates_choose_better_than_raw_ones_on_fresh_problems() -> None:
    rng = np.random.default_rng(5)
    better = []
    for _ in range(200):
        truth = np.clip(rng.beta(1, 3, (6, 1)) * rng.uniform(0.6, 1.4, (6, 8)), 0, 1)
        tried = np.full((6, 8), 2)
        good = rng.binomial(2, truth)
        raw = coverage(truth, allocate(good / tried, 8).samples)
        better.append(coverage(truth, allocate(rates(good, tried), 8).samples) - raw)

    assert np.mean(better) > 3 * np.std(better) / np.sqrt(len(better))


def test_what_cannot_be_allocated_is_refused() -> None:
    p = np.array([[0.5, 0.5]])

    with pytest.raises(ConfigError, match="cost above 0"):
        allocate(p, 4, costs=[0.0])
    with pytest.raises(ConfigError, match="budget of -1"):
        allocate(p, -1)
    with pytest.raises(ConfigError, match="rates in"):
        allocate(np.array([[1.5]]), 4)
    with pytest.raises(ConfigError, match="0 <= good <= tried"):
        rates([[3]], [[2]])
    with pytest.raises(ConfigError, match="pass@3"):
        pass_at_k(2, 1, 3)
