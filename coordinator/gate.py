"""Whether a round is kept: figures before and after it, compared so that few liars change nothing.

Knows accuracies by who measured them. Does not know models, factors or how a round is undone; the
program rolls back to the state it had (`fedavg.py`, `crosslm.py`).

Two looks (PROTOCOL.md 4.1). The coordinator measures the aggregate on labelled texts of its own,
before anything is published. Devices measure the release on texts of theirs and report; there the
*median device's* change counts, each against its own former figure, so that less than half of them
cannot have a good round thrown away, nor a bad one kept.

A figure from n texts swings by chance, so a drop must exceed `max_drop` plus two standard errors of
the difference. Not promised: that a slow decline below that is noticed in one step; it is noticed
once the sum of steps is, because what is compared with is the best round kept, not the last.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import msgspec

from coordinator.programs import Reply
from edge_sdk.train.lora import Factors
from edge_sdk.wire.messages import ModelReport

COORDINATOR = "coordinator"
"""The name under which the coordinator's own figure is kept; no device may have it."""

Judge = Callable[[Factors], tuple[float, int]]
"""Global factors -> accuracy in [0, 1] and the number of texts it was measured on."""


class Figure(msgspec.Struct, frozen=True):
    """An accuracy in [0, 1] measured on `texts` texts."""

    accuracy: float
    texts: int

    def margin(self, other: "Figure") -> float:
        """Two standard errors of the difference of two accuracies on texts of this number."""
        return 2.0 * math.sqrt(_variance(self) + _variance(other))


@dataclass(slots=True)
class Gate:
    """The best figures of rounds that were kept, and what is worse than them.

    Attributes:
        max_drop: how far accuracy may fall, besides chance; 1 keeps every round.
        judge: the coordinator's own measurement; None where it has no labelled texts.
        best: who measured -> best figure of a kept round.
    """

    max_drop: float = 1.0
    judge: Judge | None = None
    best: dict[str, Figure] = field(default_factory=dict)

    def start(self, factors: Factors) -> None:
        """Measure where the first round starts from; once."""
        if self.judge is not None and self.max_drop < 1.0 and COORDINATOR not in self.best:
            self.best[COORDINATOR] = Figure(*self.judge(factors))

    def measured(self, factors: Factors) -> str:
        """Measure an aggregate; return why it must not be kept, "" if it may."""
        if self.judge is None or self.max_drop >= 1.0:
            return ""
        return self._verdict({COORDINATOR: Figure(*self.judge(factors))})

    def reported(self, replies: Iterable[Reply]) -> str:
        """Judge a release by devices' reports; return why it must not be kept, "" if it may."""
        if self.max_drop >= 1.0:
            return ""
        return self._verdict(_reports(replies))

    def _verdict(self, found: Mapping[str, Figure]) -> str:
        both = sorted(found.keys() & self.best.keys())
        drops = sorted(
            self.best[name].accuracy - found[name].accuracy - self.best[name].margin(found[name])
            for name in both
        )
        # The lower of the two middle ones: half of an even number of devices is not enough.
        middle = drops[(len(drops) - 1) // 2] if drops else 0.0
        if middle > self.max_drop:
            who = both[0] if len(both) == 1 else f"the median of {len(both)} devices"
            return (
                f"accuracy fell by {middle:.3f} more than chance explains, measured by {who}; "
                f"allowed are {self.max_drop:.3f}"
            )
        for name, figure in found.items():
            known = self.best.get(name)
            if known is None or figure.accuracy > known.accuracy:
                self.best[name] = figure
        return ""

    def to_bytes(self) -> bytes:
        """Return the figures, for a program's state."""
        return msgspec.json.encode(dict(sorted(self.best.items())))

    def restore(self, data: bytes) -> Self:
        """Take up what `to_bytes` returned; b"" is nothing."""
        self.best = msgspec.json.decode(data, type=dict[str, Figure]) if data else {}
        return self


def _variance(figure: Figure) -> float:
    # With Laplace's rule, so that 0 of 3 is not taken for certain.
    share = (figure.accuracy * figure.texts + 1.0) / (figure.texts + 2.0)
    return share * (1.0 - share) / max(1, figure.texts)


def _reports(replies: Iterable[Reply]) -> dict[str, Figure]:
    return {
        reply.device: Figure(reply.message.accuracy, reply.message.examples)
        for reply in replies
        if isinstance(reply.message, ModelReport) and reply.message.examples > 0
    }
