"""Which texts a teacher knows better: losses that tokenizers share, and DualMinCE.

Knows losses as arrays. Does not know models, tokenizers, texts or how a loss is computed.
"""

import numpy as np
import numpy.typing as npt

from edge_sdk.algorithms.vocabulary import NONE

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


def bits_per_byte(nats: F32, sizes: I64) -> F32:
    """Summed cross-entropies in nats as bits per byte of the target, so tokenizers compare."""
    result: F32 = (nats / np.log(2) / sizes).astype(np.float32)
    return result


def dual_min_ce(own: F32, teachers: F32) -> I64:
    """The teacher of every text, (texts,), or NONE: the one of least loss, if less than one's own.

    `own` (texts,), `teachers` (teachers, texts), in one unit.

    Source: DualMinCE, FedMKT (arXiv 2406.02224) algorithm 1; PAPERS.md 2 (b), steps 4 and 7.
    """
    if not len(teachers):
        return np.full(len(own), NONE, np.int64)
    best = teachers.argmin(axis=0)
    better = teachers[best, np.arange(len(own))] < own
    return np.where(better, best, NONE).astype(np.int64)


def surer(own: F32, teacher: F32, sizes: I64) -> npt.NDArray[np.bool_]:
    """The texts on which a single teacher is better, (texts,); losses in nats, `sizes` in bytes."""
    best = dual_min_ce(bits_per_byte(own, sizes), bits_per_byte(teacher, sizes)[None])
    result: npt.NDArray[np.bool_] = best != NONE
    return result
