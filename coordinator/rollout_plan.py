"""What a roll-out is: its plan, its states, and one of them as the book holds it.

Knows values. Does not know tables (rollout.py) or what is done about them (staging.py).
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct


class State(StrEnum):
    """Where a roll-out stands."""

    STAGED = "staged"
    MEASURING = "measuring"
    CANARY = "canary"
    PAUSED = "paused"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled-back"
    WITHDRAWN = "withdrawn"


OPEN = (State.STAGED, State.MEASURING, State.CANARY, State.PAUSED)
"""States in which a release is on trial; at most one per family."""


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """How a release is tried, and what makes the service take it back by itself."""

    share: Annotated[
        float, Meta(gt=0, le=1, description="Share of the family's devices that try a release.")
    ] = 0.1
    size: Annotated[
        int, Meta(ge=0, le=100_000, description="Number of devices that try it; 0: by share.")
    ] = 0
    max_drop: Annotated[
        float,
        Meta(ge=0, le=1, description="Most that the trial devices' accuracy may fall."),
    ] = 0.05
    min_speed: Annotated[
        float,
        Meta(ge=0, le=1, description="Least share of the earlier tokens per second; 0: any."),
    ] = 0.25
    max_failures: Annotated[
        int, Meta(ge=0, le=100_000, description="Trial devices on which it may fail its probe.")
    ] = 0
    within_s: Annotated[
        float,
        Meta(
            gt=0, le=31 * 86_400, description="Seconds to wait for the trial devices; then pause."
        ),
    ] = 86_400.0
    promote: Annotated[
        bool, Meta(description="Promote by itself when every trial device did well.")
    ] = False
    devices: Annotated[
        tuple[str, ...], Meta(max_length=100_000, description="These devices try it; empty: drawn.")
    ] = ()


@dataclass(frozen=True, slots=True)
class Rollout:
    """One roll-out. `before` is the release that ran when it began; `since` that of its state."""

    number: int
    family: str
    release: str
    before: str | None
    state: State
    plan: Plan
    canary: tuple[str, ...]
    since: float
    why: str
    settled: bool


def summary(rollout: Rollout) -> dict[str, Any]:
    """Return a roll-out as plain values."""
    shown = asdict(rollout)
    return {**shown, "state": str(rollout.state), "plan": msgspec.to_builtins(rollout.plan)}
