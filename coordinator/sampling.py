"""Who writes a round's texts, how hot, and how many: the budget is divided by what was of use.

Knows ways of writing, labels and counts. Does not know models; `crosslm.py` writes and judges.

A way is a writer (the LLM as it has learned, or its frozen start, which cannot collapse) at a
temperature. A text is of use if it enters S. Every SLOT texts should hold one of use for each
label, so OSCA divides SLOT texts over the ways, and a round repeats that division.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from coordinator.algorithms.osca import allocate, rates

SLOT = 8
"""Texts among which each label should have one of use."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way of writing: `llm` with its adapter on, or `start` with it off."""

    writer: Literal["llm", "start"] = "llm"
    temperature: float = 0.9


class Sampler:
    """Divides texts over `ways` by how many of each were of use, label by label.

    Attributes:
        good, tried: counts, (ways, labels).
    """

    def __init__(self, ways: Sequence[Way], labels: Sequence[str]) -> None:
        self.ways, self.labels = tuple(ways), tuple(labels)
        self.good = np.zeros((len(self.ways), len(self.labels)), np.int64)
        self.tried = np.zeros_like(self.good)

    def divide(self, n: int) -> list[int]:
        """How many of `n` texts each way writes; the sum is `n`."""
        if len(self.ways) == 1:
            return [n]
        slot = allocate(rates(self.good, self.tried), max(SLOT, len(self.ways))).samples
        exact = np.array(slot) / sum(slot) * n
        counts = np.floor(exact).astype(int)
        for i in np.argsort(counts - exact, kind="stable")[: n - counts.sum()]:
            counts[i] += 1
        return [int(count) for count in counts]

    def learn(self, ways: Sequence[int], labels: Sequence[str], of_use: Sequence[bool]) -> None:
        """Count texts: which way wrote each, for which label, and whether it entered S."""
        for way, label, good in zip(ways, labels, of_use, strict=True):
            self.tried[way, self.labels.index(label)] += 1
            self.good[way, self.labels.index(label)] += good

    def to_bytes(self) -> bytes:
        """The counts."""
        return msgspec.json.encode([self.good.tolist(), self.tried.tolist()])

    def restore(self, data: bytes) -> None:
        """Take up what `to_bytes` returned; counts of other ways or labels are not taken."""
        good, tried = (np.array(rows, np.int64) for rows in msgspec.json.decode(data))
        if good.shape == self.good.shape:
            self.good, self.tried = good, tried
