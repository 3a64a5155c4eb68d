"""Adding up adapters: the identity to 1e-12, the gauge, staleness, clipping, refusals."""

import numpy as np
import pytest

from coordinator.aggregate import Contribution, aggregate, change_norm, refactor, staleness_weight
from coordinator.robust import Rule
from edge_sdk.errors import LocalProtocolError, RemoteProtocolError

SLOT = "model.layers.0.self_attn.q_proj"
R, IN, OUT = 4, 24, 20


def factors(seed, *, dtype=np.float64, A=None, scale=1.0):
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(R, IN)) if A is None else A
    return {
        f"{SLOT}.lora_A": own.astype(dtype),
        f"{SLOT}.lora_B": (scale * rng.normal(size=(OUT, R))).astype(dtype),
    }


def product(given):
    return given[f"{SLOT}.lora_B"].astype(float) @ given[f"{SLOT}.lora_A"].astype(float)


def stacked(parts, weights):
    left = np.concatenate([w * p[f"{SLOT}.lora_B"] for p, w in zip(parts, weights, strict=True)], 1)
    return left, np.concatenate([p[f"{SLOT}.lora_A"] for p in parts], 0)


def test_averaging_factors_is_wrong_by_exactly_the_covariance():
    parts = [factors(seed) for seed in range(3)]
    A = np.stack([p[f"{SLOT}.lora_A"] for p in parts])
    B = np.stack([p[f"{SLOT}.lora_B"] for p in parts])

    gap = np.mean(B @ A, axis=0) - B.mean(0) @ A.mean(0)

    covariance = np.mean((B - B.mean(0)) @ (A - A.mean(0)), axis=0)
    assert np.abs(gap - covariance).max() < 1e-12


def test_refactoring_at_sufficient_rank_is_the_mean_product_to_1e_12():
    """Devices that share A have a mean of rank r: nothing may be lost, and A must not move."""
    A = np.random.default_rng(9).normal(size=(R, IN))
    parts = [factors(seed, A=A) for seed in range(4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    mean = sum(w * product(p) for p, w in zip(parts, weights, strict=True))

    B_new, A_new, lost, energy = refactor(*stacked(parts, weights), A)

    assert np.abs(B_new @ A_new - mean).max() < 1e-12 * np.abs(mean).max() * 10
    assert np.abs(A_new - A).max() < 1e-11
    assert lost < 1e-20 * energy


def test_refactoring_loses_exactly_the_svd_tail():
    parts = [factors(seed) for seed in range(3)]
    mean = sum(product(p) for p in parts) / 3

    B_new, A_new, lost, energy = refactor(*stacked(parts, [1 / 3] * 3), parts[0][f"{SLOT}.lora_A"])

    singular = np.linalg.svd(mean, compute_uv=False)
    assert lost == pytest.approx(np.sum(singular[R:] ** 2), rel=1e-12)
    assert energy == pytest.approx(np.sum(mean**2), rel=1e-12)
    assert np.sum((mean - B_new @ A_new) ** 2) == pytest.approx(lost, rel=1e-9)


def test_the_new_input_factor_spans_the_mean_and_keeps_the_old_size_and_place():
    rng = np.random.default_rng(5)
    A = factors(0)[f"{SLOT}.lora_A"]
    parts = [factors(seed) for seed in range(3)]
    for part in parts:
        part[f"{SLOT}.lora_A"] = A + 0.05 * rng.normal(size=A.shape)
    mean = sum(product(p) for p in parts) / 3

    _, A_new, *_ = refactor(*stacked(parts, [1 / 3] * 3), A)

    V = np.linalg.svd(mean)[2][:R].T
    assert np.abs(A_new - A_new @ V @ V.T).max() < 1e-12
    assert np.allclose(np.linalg.svd(A_new)[1], np.linalg.svd(A)[1], rtol=1e-12)
    assert np.linalg.norm(A_new - A) < 0.1 * np.linalg.norm(A)


def test_a_shared_input_factor_comes_back_unchanged():
    A = factors(0)[f"{SLOT}.lora_A"]
    parts = [factors(seed, A=A) for seed in range(3)]

    B_new, A_new, *_ = refactor(*stacked(parts, [1 / 3] * 3), A)

    assert np.abs(A_new - A).max() < 1e-12
    assert np.abs(B_new - sum(p[f"{SLOT}.lora_B"] for p in parts) / 3).max() < 1e-12


def test_the_factors_stay_bounded_over_many_rounds():
    """Devices that turn A far in every round; A's plain projection lets B grow without end."""
    rng = np.random.default_rng(6)
    now = factors(0)
    first = np.linalg.svd(now[f"{SLOT}.lora_A"])[1]

    for _ in range(30):
        A = now[f"{SLOT}.lora_A"]
        parts = [
            {
                f"{SLOT}.lora_A": A + 0.8 * rng.normal(size=A.shape),
                f"{SLOT}.lora_B": rng.normal(size=now[f"{SLOT}.lora_B"].shape),
            }
            for _ in range(3)
        ]
        B_new, A_new, *_ = refactor(*stacked(parts, [1 / 3] * 3), A)
        now = {f"{SLOT}.lora_A": A_new, f"{SLOT}.lora_B": B_new}

    assert np.allclose(np.linalg.svd(now[f"{SLOT}.lora_A"])[1], first, rtol=1e-9)
    assert np.abs(now[f"{SLOT}.lora_B"]).max() < 10


def test_an_unusable_gauge_is_mended_without_loss():
    part = factors(1)
    A = np.random.default_rng(2).normal(size=(R, IN))
    A[1] = A[0] + 1e-9 * A[1]  # two rows all but equal

    B_new, A_new, lost, energy = refactor(*stacked([part], [1.0]), A)

    assert np.abs(B_new @ A_new - product(part)).max() < 1e-10
    assert lost < 1e-20 * energy
    assert np.linalg.cond(A_new) < 1e2


def test_a_mean_of_lower_rank_keeps_the_free_directions():
    part = factors(1)
    part[f"{SLOT}.lora_B"][:, 2:] = 0.0
    A = np.random.default_rng(2).normal(size=(R, IN))

    B_new, A_new, *_ = refactor(*stacked([part], [1.0]), A)

    assert np.abs(B_new @ A_new - product(part)).max() < 1e-10
    assert np.linalg.matrix_rank(A_new) == R


def test_the_input_factor_is_as_training_left_it_where_all_devices_span_one_space():
    start = factors(0, dtype=np.float32, scale=0.1)
    rng, A = np.random.default_rng(5), start[f"{SLOT}.lora_A"]
    grown = [((1 + k / 4) * np.eye(R) + 0.05 * rng.normal(size=(R, R))) @ A for k in range(3)]
    parts = [Contribution(n, factors(i, A=own, dtype=np.float32), 10 * (i + 1))
             for i, (n, own) in enumerate(zip("abc", grown, strict=True))]  # fmt: skip

    result = aggregate(start, parts, rule=Rule(examples=1e9, clip=1e9))

    mean = sum(c.examples / 60 * c.factors[f"{SLOT}.lora_A"] for c in parts)
    assert np.linalg.norm(mean) > 1.2 * np.linalg.norm(A)
    np.testing.assert_allclose(result.factors[f"{SLOT}.lora_A"], mean, atol=1e-4)


def test_nothing_learned_changes_nothing():
    start = factors(1, scale=0.0, dtype=np.float32)

    result = aggregate(start, [Contribution("a", start, 5), Contribution("b", start, 7)])

    for key, value in start.items():
        assert np.array_equal(result.factors[key], value)
    assert result.discarded == 0.0


def test_aggregate_is_the_example_weighted_mean_of_products_in_any_order():
    start = factors(0, dtype=np.float32, scale=0.1)
    A = start[f"{SLOT}.lora_A"]
    parts = [Contribution(n, factors(i, A=A, dtype=np.float32), 10 * i)
             for i, n in enumerate("abc", start=1)]  # fmt: skip

    result = aggregate(start, parts, rule=Rule(examples=1e9))

    mean = sum(c.examples / 60 * product(c.factors) for c in parts)
    assert np.abs(product(result.factors) - mean).max() < 1e-5
    assert sum(result.weights.values()) == pytest.approx(1.0)
    turned = aggregate(start, parts[::-1], rule=Rule(examples=1e9))
    assert all(np.array_equal(turned.factors[k], v) for k, v in result.factors.items())


def test_a_late_update_counts_as_its_own_change_with_less_weight():
    old, now = factors(1, dtype=np.float32), factors(2, dtype=np.float32)
    A = now[f"{SLOT}.lora_A"]
    fresh = Contribution("a", factors(3, A=A, dtype=np.float32), 10)
    late = Contribution("b", old, 10, staleness=3, base=old)  # came back without any change

    result = aggregate(now, [fresh, late], rule=Rule(clip=1e9))

    w = 1.0 / (1.0 + staleness_weight(3))
    wanted = w * product(fresh.factors) + (1 - w) * product(now)
    assert staleness_weight(3) == 0.5
    assert result.weights["a"] == pytest.approx(w)
    assert np.abs(product(result.factors) - wanted).max() < 1e-4


def test_one_loud_device_is_clipped_to_the_median():
    start = factors(0, dtype=np.float32, scale=0.0)
    A = start[f"{SLOT}.lora_A"]
    parts = [Contribution(n, factors(i, A=A, dtype=np.float32), 1) for i, n in enumerate("abc", 1)]
    parts.append(Contribution("loud", factors(9, A=A, dtype=np.float32, scale=1e3), 1))

    result = aggregate(start, parts)

    assert set(result.clipped) == {"loud"}
    quiet = max(change_norm(c.factors, start) for c in parts[:3])
    assert change_norm(result.factors, start) < 2 * quiet


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_name_device_and_factor(value):
    start, bad = factors(0, dtype=np.float32), factors(1, dtype=np.float32)
    bad[f"{SLOT}.lora_B"][3, 1] = value

    with pytest.raises(RemoteProtocolError, match=r"kitchen-1.*q_proj\.lora_B.*finite"):
        aggregate(start, [Contribution("kitchen-1", bad, 1)])


def test_other_shapes_names_and_emptiness_are_refused():
    start = factors(0, dtype=np.float32)
    wrong = start | {f"{SLOT}.lora_A": np.zeros((R, IN + 1), np.float32)}
    with pytest.raises(RemoteProtocolError, match=r"kitchen-1.*shape"):
        aggregate(start, [Contribution("kitchen-1", wrong, 1)])
    with pytest.raises(RemoteProtocolError, match="unknown factor x"):
        aggregate(start, [Contribution("a", start | {"x": start[f"{SLOT}.lora_A"]}, 1)])
    with pytest.raises(LocalProtocolError):
        aggregate(start, [])


def test_norm_of_change_equals_the_dense_one():
    new, old = factors(1), factors(2)
    assert change_norm(new, old) == pytest.approx(np.linalg.norm(product(new) - product(old)))
