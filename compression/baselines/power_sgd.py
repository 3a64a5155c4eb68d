"""PowerSGD: each matrix of the update by its leading singular directions, from a warm start.

Knows numpy and the shapes of the tensors. Does not know who averages.

Vogels, Karimireddy, Jaggi: "PowerSGD", arXiv 1905.13727, algorithm 1: P = M Q, orthogonalise P,
Q = M^T P, send both. There workers average P before they orthogonalise it; a device of ours speaks
alone, so its own P and Q travel, and the warm start is its own last Q.
"""

import math
from collections.abc import Sequence

import numpy as np

from compression.baselines.method import F32


class PowerSgd:
    """Rank-`rank` factors of every matrix, float16; vectors as they are.

    Raises:
        ValueError: a rank below 1.
    """

    feedback = True

    def __init__(self, shapes: Sequence[tuple[int, ...]], rank: int = 1) -> None:
        if rank < 1:
            raise ValueError(f"rank {rank} of PowerSGD must be at least 1")
        self.name, self._shapes, self._rank = f"powersgd {rank}", tuple(shapes), rank
        self._warm: list[F32] = []

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """Two bytes for each value of all P and Q."""
        if not self._warm:
            self._warm = [
                rng.standard_normal((s[1], min(self._rank, *s))).astype(np.float32)
                for s in self._shapes
                if len(s) == 2
            ]
        parts, warm, start = [], iter(range(len(self._warm))), 0
        for shape in self._shapes:
            size = math.prod(shape)
            piece = values[start : start + size].reshape(shape)
            start += size
            if len(shape) != 2:
                parts.append(piece.reshape(-1))
                continue
            i = next(warm)
            P = np.linalg.qr(piece @ self._warm[i])[0]  # (rows, rank)
            P = P.astype(np.float16).astype(np.float32)  # what the receiver has
            Q = piece.T @ P  # (columns, rank)
            self._warm[i] = Q
            parts += [P.reshape(-1), Q.reshape(-1)]
        return np.concatenate(parts).astype("<f2").tobytes()

    def decode(self, data: bytes, size: int) -> F32:
        """As `Baseline.decode`."""
        sent = np.frombuffer(data, "<f2").astype(np.float32)
        pieces, start = [], 0

        def take(*shape: int) -> F32:
            nonlocal start
            start += math.prod(shape)
            return sent[start - math.prod(shape) : start].reshape(shape)

        for shape in self._shapes:
            if len(shape) != 2:
                pieces.append(take(math.prod(shape)))
                continue
            rank = min(self._rank, *shape)
            P, Q = take(shape[0], rank), take(shape[1], rank)
            pieces.append((P @ Q.T).reshape(-1))
        return np.asarray(np.concatenate(pieces), np.float32)
