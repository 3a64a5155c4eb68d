"""What a figure of the torture suite returns, and what it may print while it works.

Knows the shape of a result. Does not know how results are collected: that is __main__.py.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Value = float | int | bool | Mapping[str, object]

_MINUTES = "TORTURE_MINUTES"


class Scale(StrEnum):
    """How much of a figure to run."""

    SHORT = "short"
    """A few seconds, for CI: the same code and checks, smaller numbers."""
    FULL = "full"
    """The numbers of the goal."""


@dataclass(frozen=True, slots=True)
class Result:
    """One figure, measured.

    `lost` are updates that the coordinator had confirmed and nobody found later, `doubled` those
    counted twice; None where the figure has no updates. `command` may stay empty: the runner
    writes the one that repeats the figure. `notes` are plain JSON values and name no path.
    """

    code: str
    title: str
    value: Value
    unit: str
    goal: str
    passed: bool
    lost: int | None = None
    doubled: int | None = None
    command: str = ""
    notes: dict[str, object] = field(default_factory=dict)


Run = Callable[..., Result]
"""`run(scale: Scale, seed: int, folder: Path) -> Result`; `folder` is empty and thrown away."""


def say(code: str, text: str) -> None:
    """Print one line of progress at once, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {code}: {text}", file=sys.stderr, flush=True)


def minutes(default: float) -> float:
    """Return what `--minutes` asked for, for the figures that run as long as one lets them."""
    return float(os.environ.get(_MINUTES) or default)


def ask_minutes(wish: float) -> None:
    """Make `minutes` return `wish` here and in every process started from here."""
    os.environ[_MINUTES] = str(wish)
