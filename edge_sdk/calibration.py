"""How sure a model may be: one temperature fitted on labelled text that it was not trained on.

Knows probabilities and right answers. Does not know models or examples.

Small models fine-tuned on few examples are over-confident, and a score that is to be averaged with
others' must mean what it says.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

MIN_TEXTS = 10
"""On fewer texts the fit says more about chance than about the model."""
COLDEST, HOTTEST = 0.25, 8.0
"""Range of the temperature; beyond it the fit only says "always right" or "knows nothing"."""
TRIALS = 60
"""Temperatures tried, evenly in their logarithm: six per cent apart."""


def fit_temperature(probs: F32, right: Sequence[int]) -> float:
    """The temperature in [0.25, 8] under which `right` is likeliest; 1 for fewer than 10 texts.

    `probs` (n, labels), `right` the n right columns. Above 1: the model was too sure.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """
    if len(right) < MIN_TEXTS:
        return 1.0
    heats = np.geomspace(COLDEST, HOTTEST, TRIALS)
    rows = np.arange(len(right))

    def loss(heat: float) -> float:
        return -float(np.log(tempered(probs, heat)[rows, list(right)]).mean())

    return float(min([1.0, *heats], key=loss))


def tempered(probs: F32, temperature: float) -> F32:
    """`probs` (n, labels) as they would be with the logits divided by `temperature`."""
    logs = np.log(np.maximum(probs, 1e-12)) / temperature
    powers = np.exp(logs - logs.max(axis=1, keepdims=True))
    result: F32 = np.maximum(powers / powers.sum(axis=1, keepdims=True), 1e-12).astype(np.float32)
    return result


def calibration_error(probs: F32, right: Sequence[int], *, bins: int = 10) -> float:
    """Expected calibration error in [0, 1]: how far confidence and accuracy are apart.

    Source: Guo et al. 2017, section 2, equation 3; equal-width bins.
    """
    sure, hit = probs.max(axis=1), probs.argmax(axis=1) == np.asarray(right)
    at = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [
        abs(float(hit[at == b].mean()) - float(sure[at == b].mean())) * float((at == b).mean())
        for b in range(bins)
        if (at == b).any()
    ]
    return math.fsum(gaps)
