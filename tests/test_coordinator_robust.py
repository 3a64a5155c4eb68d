"""Bounds on one contribution, the geometric median against brute force, and the gate."""

import numpy as np
import pytest

from coordinator.aggregate import Contribution, aggregate, change_gram, change_norm
from coordinator.gate import Figure, Gate
from coordinator.programs import Reply
from coordinator.robust import Rule, fair_counts, geometric_median, kept_shares
from edge_sdk.wire.messages import ModelReport

SLOT = "q_proj"


def cost(point, points, weights):
    return float(np.sum(weights * np.linalg.norm(points - point, axis=1)))


@pytest.mark.parametrize("seed", range(12))
def test_the_geometric_median_beats_a_fine_search_in_the_plane(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(int(rng.integers(2, 8)), 2)) * rng.uniform(0.1, 10)
    weights = rng.uniform(0.2, 5, size=len(points))

    v = geometric_median(points @ points.T, weights)

    found = cost(v @ points, points, weights)
    low, high = points.min(axis=0), points.max(axis=0)
    grid = np.stack(np.meshgrid(*np.linspace(low, high, 201).T), axis=-1).reshape(-1, 2)
    distances = np.linalg.norm(grid[:, None] - points[None], axis=2)
    assert found <= (distances @ weights).min() + 1e-9
    assert v.sum() == pytest.approx(1.0)
    assert (v >= 0).all()


def test_the_geometric_median_is_a_stationary_point_in_many_dimensions():
    rng = np.random.default_rng(3)
    points, weights = rng.normal(size=(9, 40)), rng.uniform(1, 3, 9)

    centre = geometric_median(points @ points.T, weights) @ points

    apart = points - centre
    pull = (weights[:, None] * apart / np.linalg.norm(apart, axis=1, keepdims=True)).sum(axis=0)
    assert np.linalg.norm(pull) < 1e-6 * weights.sum()


def test_a_point_with_more_than_half_of_the_weight_is_the_median_exactly():
    points = np.random.default_rng(1).normal(size=(4, 5))
    v = geometric_median(points @ points.T, np.array([1.0, 1.0, 3.5, 1.0]))
    assert v.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_equal_points_keep_their_weights():
    points = np.ones((3, 4))
    v = geometric_median(points @ points.T, np.array([1.0, 2.0, 1.0]))
    assert v.tolist() == [0.25, 0.5, 0.25]


def factors(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    A = np.random.default_rng(99).normal(size=(4, 24)).astype(np.float32)
    B = (scale * rng.normal(size=(20, 4))).astype(np.float32)
    return {f"{SLOT}.lora_A": A, f"{SLOT}.lora_B": B}


def product(given):
    return (given[f"{SLOT}.lora_B"].astype(float) @ given[f"{SLOT}.lora_A"].astype(float)).ravel()


def test_the_median_of_adapters_is_the_median_of_their_products():
    start = factors(0, scale=0.0)
    parts = [Contribution(n, factors(i), 10) for i, n in enumerate("abcde", 1)]
    rule = Rule("geometric-median", clip=1e9, refuse=0.0)

    result = aggregate(start, parts, rule=rule)

    points = np.stack([product(part.factors) for part in parts])
    wanted = geometric_median(points @ points.T, np.ones(5)) @ points
    assert np.abs(product(result.factors) - wanted).max() < 1e-4
    gram = change_gram(parts, start)
    assert np.allclose(gram, points @ points.T, rtol=1e-6)


def test_two_of_five_pulling_together_move_the_median_less_than_the_mean():
    start, truth = factors(0, scale=0.0), factors(50)
    honest = [Contribution(n, mixed(truth, factors(i, 0.2)), 10) for i, n in enumerate("abc", 1)]
    liars = [Contribution(n, negative(truth), 10) for n in "xy"]

    off = {
        kind: np.linalg.norm(
            product(aggregate(start, [*honest, *liars], rule=Rule(kind)).factors) - product(truth)
        )
        for kind in ("mean", "geometric-median")
    }

    assert off["geometric-median"] < 0.6 * off["mean"]


def mixed(one, other):
    key = f"{SLOT}.lora_B"
    return {**one, key: one[key] + other[key]}


def negative(given):
    return {**given, f"{SLOT}.lora_B": -given[f"{SLOT}.lora_B"]}


def test_an_outlier_is_left_out_and_named_and_the_rest_is_their_mean():
    start = factors(0, scale=0.0)
    parts = [Contribution(n, factors(i), 1) for i, n in enumerate("abc", 1)]
    loud = Contribution("loud", factors(9, scale=1e4), 2**40)

    result = aggregate(start, [*parts, loud])

    assert set(result.outliers) == {"loud"}
    assert result.weights["loud"] == 0.0
    without = aggregate(start, parts)
    assert all(np.allclose(result.factors[k], v) for k, v in without.factors.items())
    assert change_norm(result.factors, start) > 0


def test_a_device_is_not_believed_more_examples_than_the_median():
    assert fair_counts(np.array([10.0, 20.0, 2.0**40]), 1.0).tolist() == [10.0, 20.0, 20.0]
    assert fair_counts(np.array([0.0, 0.0]), 1.0).tolist() == [1.0, 1.0]


def test_devices_that_did_nothing_silence_nobody():
    shares = kept_shares(np.array([0.0, 0.0, 0.0, 5.0]), Rule())
    assert shares.tolist() == [1.0, 1.0, 1.0, 1.0]


def reports(**accuracies):
    return [
        Reply(name, ModelReport("t", "r", share, 400, 1.0, 1.0, {}))
        for name, share in accuracies.items()
    ]


def test_a_round_that_most_devices_find_worse_is_not_kept():
    gate = Gate(0.05)
    assert gate.reported(reports(a=0.8, b=0.7, c=0.75)) == ""

    said = gate.reported(reports(a=0.5, b=0.4, c=0.75))

    assert "the median of 3 devices" in said
    assert gate.best["a"] == Figure(0.8, 400)


def test_less_than_half_of_the_devices_can_neither_sink_nor_save_a_round():
    gate = Gate(0.05)
    gate.reported(reports(a=0.8, b=0.8, c=0.8, x=1.0, y=1.0))

    assert gate.reported(reports(a=0.82, b=0.81, c=0.8, x=0.0, y=0.0)) == ""
    assert gate.reported(reports(a=0.4, b=0.4, c=0.4, x=1.0, y=1.0)) != ""


def test_chance_is_not_held_against_a_round():
    gate = Gate(0.0)
    few = [Reply("a", ModelReport("t", "r", share, 10, 1.0, 1.0, {})) for share in (0.8, 0.6)]
    assert gate.reported(few[:1]) == ""
    assert gate.reported(few[1:]) == ""


def test_the_coordinators_own_measure_comes_first_and_survives_a_restart():
    shares = iter([0.6, 0.7, 0.3])
    gate = Gate(0.05, lambda factors: (next(shares), 1000))
    gate.start({})

    assert gate.measured({}) == ""
    again = Gate(0.05, gate.judge).restore(gate.to_bytes())
    again.start({})  # known already: not measured anew
    assert "measured by coordinator" in again.measured({})


def test_without_a_limit_every_round_is_kept():
    gate = Gate(judge=lambda factors: (0.0, 1000))
    gate.best["a"] = Figure(1.0, 1000)
    assert gate.measured({}) == gate.reported(reports(a=0.0)) == ""
