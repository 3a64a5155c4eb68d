"""Held-out bits per byte of each model, what is worse than before, and when to stop.

Knows figures by name. Does not know models, rounds or how one is undone.

Figures are of one fixed set of texts and come without chance of their own, so no margin is added
for it; `max_rise` is for what local training shifts. Lower is better.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

LEAST_GAIN = 1e-3
"""Relative; less is no gain, or the last thousandth would keep a run going."""


class _Held(msgspec.Struct):
    best: dict[str, float]
    waited: int


@dataclass(slots=True)
class Yardstick:
    """The best figures so far.

    Attributes:
        max_rise: how far a figure may rise above its best, relatively, before it is a fault.
        patience: rounds without any gain after which `over` is true; 0: never.
        best: name -> lowest figure of a kept round.
        waited: rounds without gain since the last one.
    """

    max_rise: float
    patience: int = 0
    best: dict[str, float] = field(default_factory=dict)
    waited: int = 0

    def fault(self, name: str, figure: float | None) -> str:
        """Say why `figure` of `name` must not be kept, "" if it may; without a figure it may."""
        best = self.best.get(name)
        if figure is None or best is None or figure <= best * (1 + self.max_rise):
            return ""
        return (
            f"{name} needs {figure:.4f} bits per byte of held-out text, its best is {best:.4f}; "
            f"allowed is a rise of {self.max_rise:.0%}"
        )

    def keep(self, figures: Mapping[str, float | None]) -> None:
        """Take the figures of a finished round."""
        gained = False
        for name, figure in figures.items():
            best = self.best.get(name)
            if figure is None:
                continue
            if best is None or figure < best * (1 - LEAST_GAIN):
                gained = True
            self.best[name] = figure if best is None else min(best, figure)
        self.waited = 0 if gained else self.waited + 1

    @property
    def over(self) -> bool:
        """Whether nothing has gained for `patience` rounds."""
        return 0 < self.patience <= self.waited and bool(self.best)

    def to_bytes(self) -> bytes:
        """The figures, for a program's state."""
        return msgspec.json.encode(_Held(dict(sorted(self.best.items())), self.waited))

    def restore(self, data: bytes) -> None:
        """Take up what `to_bytes` returned."""
        held = msgspec.json.decode(data, type=_Held)
        self.best, self.waited = held.best, held.waited
