"""Whether training may go on just now: asked before each step, so that a device stays usable.

Knows battery, mains and load, as Linux tells them. Does not know torch, tasks or settings files.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from edge_sdk.errors import Postponed, RuntimeFailure

logger = logging.getLogger(__name__)

SUPPLIES = Path("/sys/class/power_supply")

POLL_S = 1.0
"""Seconds between two looks while waiting."""

IN_PLACE_S = 30.0
"""So long a training waits where it is, as for another program's start; then the task is put off,
which frees its memory, and goes on from its checkpoint."""


class Verdict(StrEnum):
    """What a policy may say."""

    GO = "go"
    WAIT = "wait"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Answer:
    """A verdict and its reason, which goes into the log and, with STOP, to the coordinator."""

    verdict: Verdict
    reason: str = ""


GO = Answer(Verdict.GO)


class Policy(Protocol):
    """Asked between steps; must be quick."""

    def __call__(self) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Power:
    """What feeds the device: charge in percent, None without a battery, and whether it charges or
    is on mains."""

    charge: int | None
    mains: bool


@dataclass(frozen=True, slots=True)
class Spare:
    """The ready policy: trains with what the device can spare.

    min_charge: percent of battery below which training waits, unless on mains; 0 never waits, 101
        waits whenever on battery.
    max_load: runnable processes per core, besides training's own threads, above which it waits;
        0 never waits.
    threads: CPU threads training uses, taken off the load (0: all).
    """

    min_charge: int = 0
    max_load: float = 0.0
    threads: int = 1
    power: "Callable[[], Power]" = lambda: read_power()
    load: Callable[[], float] = lambda: os.getloadavg()[0]
    cores: int = os.cpu_count() or 1

    def __call__(self) -> Answer:
        if self.min_charge:
            power = self.power()
            if power.charge is not None and not power.mains and power.charge < self.min_charge:
                return Answer(Verdict.WAIT, f"battery at {power.charge} %, below {self.min_charge}")
        if self.max_load:
            others = max(0.0, self.load() - (self.threads or self.cores)) / self.cores
            if others > self.max_load:
                return Answer(Verdict.WAIT, f"load {others:.2f} a core, above {self.max_load:g}")
        return GO


class Gate:
    """Lets training pass as its policy says.

    WAIT is waited for here up to `in_place_s`, then `Postponed` is raised; once `patience_s` have
    gone by since it last passed, WAIT counts as STOP, so that a coordinator hears of it.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        patience_s: float,
        in_place_s: float = IN_PLACE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._policy, self._patience_s, self._in_place_s = policy, patience_s, in_place_s
        self._clock, self._sleep = clock, sleep
        self._waiting_since: float | None = None

    def __call__(self) -> None:
        """Return when training may take its next step.

        Raises:
            Postponed: not now; the same training may be begun again later.
            RuntimeFailure: the policy says stop, or its patience is over.
        """
        began = self._clock()
        while True:
            answer = self._policy()
            if answer.verdict is Verdict.GO:
                self._waiting_since = None
                return
            if answer.verdict is Verdict.STOP:
                raise RuntimeFailure(f"this device stopped training: {answer.reason}")
            self._wait(answer, began)

    def _wait(self, answer: Answer, began: float) -> None:
        now = self._clock()
        if self._waiting_since is None:
            self._waiting_since = now
            logger.info("training waits: %s", answer.reason)
        if now - self._waiting_since >= self._patience_s:
            self._waiting_since = None
            raise RuntimeFailure(
                f"this device waited {self._patience_s:g} s to train: {answer.reason}"
            )
        if now - began >= self._in_place_s:
            raise Postponed(f"training is put off: {answer.reason}")
        self._sleep(POLL_S)


def read_power(folder: Path = SUPPLIES) -> Power:
    """What Linux says of batteries and mains; what cannot be read counts as mains.

    Several batteries count as their mean. A mouse's or phone's battery (scope Device) does not.
    """
    charges, charging, mains = [], False, False
    for supply in sorted(folder.glob("*")):
        kind, scope = _word(supply / "type"), _word(supply / "scope")
        if kind == "Battery" and scope != "Device":
            charge = _word(supply / "capacity")
            if charge.isdigit():
                charges.append(int(charge))
            charging = charging or _word(supply / "status") in ("Charging", "Full", "Not charging")
        elif kind in ("Mains", "USB", "Wireless"):
            mains = mains or _word(supply / "online") == "1"
    if not charges:
        return Power(None, mains=True)
    return Power(sum(charges) // len(charges), mains=mains or charging)


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
