"""The fitted temperature gives back the one that spoiled the probabilities, and never hurts."""

import numpy as np
import pytest

from edge_sdk.calibration import MIN_TEXTS, calibration_error, fit_temperature, tempered


def honest(n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, 3), and answers drawn from just those."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet((0.6, 0.6, 0.6), n).astype(np.float32)
    return probs, np.array([rng.choice(3, p=row / row.sum()) for row in probs.astype(float)])


@pytest.mark.parametrize("spoiled", [0.4, 1.0, 2.5])
def test_the_temperature_that_spoiled_is_found(spoiled: float) -> None:
    probs, right = honest(4000, seed=1)

    found = fit_temperature(tempered(probs, 1 / spoiled), right)

    assert found == pytest.approx(spoiled, rel=0.12)


def test_an_over_confident_model_is_calibrated_on_fresh_texts() -> None:
    probs, right = honest(600, seed=2)
    sure = tempered(probs, 1 / 3)

    found = fit_temperature(sure[:300], right[:300])

    fresh = calibration_error(tempered(sure[300:], found), right[300:])
    assert fresh < 0.5 * calibration_error(sure[300:], right[300:])


def test_order_and_sums_stay() -> None:
    probs, _ = honest(50, seed=3)

    hot = tempered(probs, 4.0)

    assert (hot.argmax(axis=1) == probs.argmax(axis=1)).all()
    assert np.allclose(hot.sum(axis=1), 1, atol=1e-5)
    assert np.allclose(tempered(probs, 1.0), probs, atol=1e-6)


def test_a_handful_of_texts_changes_nothing() -> None:
    probs, right = honest(MIN_TEXTS - 1, seed=4)

    assert fit_temperature(probs, right) == 1.0


def test_calibration_error_by_hand() -> None:
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], np.float32)

    # sure 0.9 and right once of two; sure 0.6 and right once of two
    assert calibration_error(probs, [0, 1, 0, 1]) == pytest.approx(0.5 * 0.4 + 0.5 * 0.1, abs=1e-6)
