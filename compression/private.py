"""Differential privacy's place in the chain: clip, add noise, and only then encode.

Knows arrays and a noise multiplier. Does not know epsilon: accounting is a library's (PROTOCOL.md
3), and encoding what has been noised is post-processing, which costs no privacy. Encoding first
would not do: a code's error depends on the private values and is not bounded by the clip.

Error feedback stays on the right side too: what it owes is the difference of two noised things.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from compression.errors import CodecError

F32 = npt.NDArray[np.float32]


def clipped_and_noised(
    update: Mapping[str, F32], *, clip: float, noise_multiplier: float, rng: np.random.Generator
) -> dict[str, F32]:
    """The update scaled to a norm of at most `clip`, plus noise of `noise_multiplier * clip`.

    The norm is over all tensors together; noise is Gaussian and independent for each value. `rng`
    must be seeded from the system's entropy in use.

    Raises:
        CodecError: a clip that is not above 0, a negative multiplier, or values not finite.

    Source: McMahan et al. 2018, arXiv 1710.06963, section 2; the Gaussian mechanism.
    """
    if not clip > 0 or not noise_multiplier >= 0:
        raise CodecError(
            f"clip {clip} must be above 0 and the noise multiplier {noise_multiplier} at least 0"
        )
    norm = float(np.sqrt(sum(float(np.square(v, dtype=np.float64).sum()) for v in update.values())))
    if not np.isfinite(norm):
        raise CodecError("an update that is not finite cannot be clipped")
    scale, sigma = min(1.0, clip / max(norm, 1e-30)), noise_multiplier * clip
    return {
        name: (value * scale + rng.normal(0.0, sigma, value.shape)).astype(np.float32)
        for name, value in sorted(update.items())
    }
