"""The book of roll-outs: which release is tried on which devices, what they said, who decided what.

Knows the tables `rollouts`, `rollout_offers` and `rollout_audit`, and which step may follow which.
Does not know messages: `staging.py` carries out what stands here, in the running service; commands
in other processes only write here.

    staged -> measuring -> canary -> promoted
                 |            |          |
                 +-- paused --+          |      (stage again goes on, promote skips the rest)
                 +------------+----------+-> rolled-back        withdrawn: for good
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from coordinator.registry import Registry
from coordinator.store import Store
from edge_sdk.errors import ConfigError

SCHEMA = """
CREATE TABLE IF NOT EXISTS rollouts (
  number INTEGER PRIMARY KEY AUTOINCREMENT, family TEXT NOT NULL, release TEXT NOT NULL,
  before TEXT, state TEXT NOT NULL, plan TEXT NOT NULL, canary TEXT NOT NULL DEFAULT '[]',
  since REAL NOT NULL, why TEXT NOT NULL, settled INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS rollout_offers (
  number INTEGER NOT NULL, purpose TEXT NOT NULL, device TEXT NOT NULL, release TEXT NOT NULL,
  state TEXT NOT NULL, task TEXT NOT NULL DEFAULT '', tries INTEGER NOT NULL DEFAULT 0,
  accuracy REAL, examples INTEGER, tokens_per_s REAL, reason TEXT NOT NULL DEFAULT '',
  at REAL NOT NULL, PRIMARY KEY (number, purpose, device, release));
CREATE INDEX IF NOT EXISTS rollout_offers_by_task ON rollout_offers (task);
CREATE INDEX IF NOT EXISTS rollout_offers_by_device ON rollout_offers (device, at);
CREATE TABLE IF NOT EXISTS rollout_audit (
  entry INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, who TEXT NOT NULL,
  action TEXT NOT NULL, family TEXT NOT NULL, release TEXT NOT NULL, why TEXT NOT NULL);
"""
SERVICE = "service"
"""Who decided, where the service did so by itself."""


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


@dataclass(frozen=True, slots=True)
class Offered:
    """One release offered to one device. `state`: open, done or failed, with `reason`."""

    number: int
    purpose: str
    device: str
    release: str
    state: str
    task: str
    tries: int
    accuracy: float | None
    examples: int | None
    tokens_per_s: float | None
    reason: str
    at: float


_ROW = "number, family, release, before, state, plan, canary, since, why, settled"
_OFFER = (
    "number, purpose, device, release, state, task, tries, accuracy, examples, tokens_per_s,"
    " reason, at"
)


class Book:
    """All roll-outs of a coordinator; every change is one transaction with its audit line."""

    def __init__(self, store: Store, registry: Registry, now: Callable[[], float]) -> None:
        self._store, self._registry, self._now = store, registry, now
        store.mailbox.create(SCHEMA)

    # --- what people decide -------------------------------------------------------------------

    def stage(self, family: str, release: str, plan: Plan, *, who: str, why: str = "") -> Rollout:
        """Begin to try `release`, or go on with a paused trial of it.

        Raises:
            ConfigError: no such release, it runs already, or another is on trial.
        """
        self._registry.require(family, release)
        with self._store.transaction() as db:
            running = self.trial(family)
            if running is not None and running.release != release:
                raise ConfigError(
                    f"{family}/{running.release} is {running.state}; promote it or roll it back "
                    "before another is staged"
                )
            if running is not None:
                if running.state is not State.PAUSED:
                    raise ConfigError(f"{family}/{release} is {running.state} already")
                state = State.CANARY if running.canary else State.STAGED
                return self._move(running, state, "stage", who, why)
            before = self._registry.promoted_name(family)
            if before == release:
                raise ConfigError(f"{family}/{release} is what devices run already")
            number = db.execute(
                "INSERT INTO rollouts (family, release, before, state, plan, since, why)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(family, release, before, State.STAGED),
                    *(msgspec.json.encode(plan).decode(), self._now(), why),
                ),
            ).lastrowid
            self._audit("stage", family, release, who, why)
            return self._get(int(number or 0))

    def promote(self, family: str, *, who: str, why: str = "") -> Rollout:
        """Let every device of `family` have the release on trial.

        Raises:
            ConfigError: none is on trial.
        """
        with self._store.transaction():
            running = self._on_trial(family, "promote")
            self._registry.promote(family, running.release)
            self._registry.unassign(family, running.release)
            return self._move(running, State.PROMOTED, "promote", who, why)

    def pause(self, family: str, *, who: str, why: str = "") -> Rollout:
        """Offer the release on trial to no further device; those that have it keep it.

        Raises:
            ConfigError: none is on trial, or it is paused.
        """
        with self._store.transaction():
            running = self._on_trial(family, "pause")
            if running.state is State.PAUSED:
                raise ConfigError(f"{family}/{running.release} is paused already")
            return self._move(running, State.PAUSED, "pause", who, why)

    def roll_back(self, family: str, *, to: str | None = None, who: str, why: str = "") -> Rollout:
        """Return every device to the release before; forward in signed metadata, never back.

        Without a roll-out the promoted release gives way to `to`, or to the one published before.

        Raises:
            ConfigError: there is nothing to return to.
        """
        with self._store.transaction() as db:
            running = self.trial(family) or self._last(family, State.PROMOTED)
            promoted = self._registry.promoted_name(family)
            on_trial = running is not None and running.state in OPEN
            if running is None or (not on_trial and running.release != promoted):
                running = None
            target = to or (running.before if running else self._registry.before(family))
            if target is None and not on_trial:
                raise ConfigError(f"{family} has no earlier release to return to")
            if target is not None:
                self._registry.promote(family, target)
            if running is None:
                number = db.execute(
                    "INSERT INTO rollouts (family, release, before, state, plan, since, why)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(family, promoted, target, State.PROMOTED),
                        *(msgspec.json.encode(Plan()).decode(), self._now(), why),
                    ),
                ).lastrowid
                running = self._get(int(number or 0))
            self._registry.unassign(family, running.release)
            db.execute("UPDATE rollouts SET before = ? WHERE number = ?", (target, running.number))
            return self._move(running, State.ROLLED_BACK, "roll-back", who, why)

    def withdraw(self, family: str, release: str, *, who: str, why: str = "") -> None:
        """Take `release` out of the signed targets for good; a trial of it is rolled back first.

        Raises:
            ConfigError: there is no such release, it is promoted, or others build on it.
            ExportError: the targets key is not here.
        """
        with self._store.transaction() as db:
            running = self.trial(family)
            if running is not None and running.release == release:
                self.roll_back(family, who=who, why=why or "withdrawn")
            self._registry.withdraw(family, release)
            db.execute(
                "UPDATE rollouts SET state = ?, since = ? WHERE family = ? AND release = ?"
                " AND state != ?",
                (State.WITHDRAWN, self._now(), family, release, State.ROLLED_BACK),
            )
            self._audit("withdraw", family, release, who, why)

    # --- what the service notes ---------------------------------------------------------------

    def choose(self, rollout: Rollout, devices: tuple[str, ...]) -> tuple[str, ...]:
        """Draw the trial devices among `devices`, the same ones every time, and note them."""
        plan = rollout.plan
        pool = [d for d in devices if not plan.devices or d in plan.devices]
        wanted = plan.size or math.ceil(plan.share * len(pool))
        if plan.devices:
            wanted = len(pool)

        def lot(device: str) -> bytes:
            return sha256(f"{rollout.number}:{device}".encode()).digest()

        chosen = tuple(sorted(sorted(pool, key=lot)[:wanted]))
        if chosen:
            state = State.MEASURING if rollout.before else State.CANARY
            with self._store.transaction() as db:
                db.execute(
                    "UPDATE rollouts SET canary = ?, state = ?, since = ? WHERE number = ?",
                    (json.dumps(chosen), state, self._now(), rollout.number),
                )
        return chosen

    def try_out(self, rollout: Rollout) -> None:
        """The trial devices have been measured as they were; now they may run the release."""
        with self._store.transaction() as db:
            self._registry.assign(rollout.family, rollout.release, rollout.canary)
            db.execute(
                "UPDATE rollouts SET state = ?, since = ? WHERE number = ? AND state = ?",
                (State.CANARY, self._now(), rollout.number, State.MEASURING),
            )

    def settle(self, number: int) -> None:
        """Everyone who should have been told of the outcome was told and answered."""
        with self._store.transaction() as db:
            db.execute("UPDATE rollouts SET settled = 1 WHERE number = ?", (number,))

    def offered(self, number: int, purpose: str | None = None) -> list[Offered]:
        """Return what was offered to whom, and what they said."""
        with self._store.transaction() as db:
            rows = db.execute(
                f"SELECT {_OFFER} FROM rollout_offers WHERE number = ?"
                " AND (? IS NULL OR purpose = ?) ORDER BY at, device",
                (number, purpose, purpose),
            ).fetchall()
        return [Offered(*row) for row in rows]

    def find(self, number: int, purpose: str, device: str, release: str) -> Offered | None:
        """Return one offer, or None if it was not made."""
        with self._store.transaction() as db:
            row = db.execute(
                f"SELECT {_OFFER} FROM rollout_offers WHERE number = ? AND purpose = ?"
                " AND device = ? AND release = ?",
                (number, purpose, device, release),
            ).fetchone()
        return Offered(*row) if row else None

    def strays(self, *, after: int) -> list[tuple[int, str, float]]:
        """Return (letter, device, when) of devices that said they run another release than asked.

        A device returns to its earlier release when files of the present one were altered, or
        when it kept crashing. Only letters above `after` are looked at.
        """
        with self._store.transaction() as db:
            return list(
                db.execute(
                    "SELECT letter, device, at FROM refused WHERE letter > ?"
                    " AND reason LIKE '%, this device runs %' ORDER BY letter",
                    (after,),
                )
            )

    def newest(self, device: str) -> Offered | None:
        """Return the release that `device` last said it runs, as far as roll-outs know."""
        with self._store.transaction() as db:
            row = db.execute(
                f"SELECT {_OFFER} FROM rollout_offers WHERE device = ? AND state = 'done'"
                " ORDER BY at DESC LIMIT 1",
                (device,),
            ).fetchone()
        return Offered(*row) if row else None

    def note_offer(self, number: int, purpose: str, device: str, release: str, task: str) -> None:
        """Note an offer that was sent, in the caller's transaction."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO rollout_offers (number, purpose, device, release, state, task, tries,"
                " at) VALUES (?, ?, ?, ?, 'open', ?, 1, ?)"
                " ON CONFLICT DO UPDATE SET state = 'open', task = excluded.task,"
                " tries = tries + 1, reason = '', at = excluded.at",
                (number, purpose, device, release, task, self._now()),
            )

    def note_answer(
        self, task: str, *, figures: Mapping[str, float] | None = None, reason: str = ""
    ) -> None:
        """Note what a device said to an offer: its figures, or why it failed."""
        figures = figures or {}
        with self._store.transaction() as db:
            db.execute(
                "UPDATE rollout_offers SET state = ?, accuracy = ?, examples = ?,"
                " tokens_per_s = ?, reason = ?, at = ? WHERE task = ? AND state = 'open'",
                (
                    "failed" if reason else "done",
                    *(figures.get(key) for key in ("accuracy", "examples", "tokens_per_s")),
                    *(reason, self._now(), task),
                ),
            )

    # --- reading ------------------------------------------------------------------------------

    def active(self) -> list[Rollout]:
        """Return every roll-out that still has something to do, oldest first."""
        return self._rows("settled = 0 AND state NOT IN ('paused', 'withdrawn')")

    def history(self, family: str | None = None) -> list[Rollout]:
        """Return all roll-outs, oldest first."""
        return self._rows("? IS NULL OR family = ?", family, family)

    def trial(self, family: str) -> Rollout | None:
        """Return the roll-out of `family` whose release is on trial."""
        marks = ", ".join("?" * len(OPEN))
        found = self._rows(f"family = ? AND state IN ({marks})", family, *OPEN)
        return found[-1] if found else None

    def audit(self, family: str | None = None, release: str | None = None) -> list[dict[str, Any]]:
        """Return who decided what, when and why, oldest first."""
        with self._store.transaction() as db:
            rows = db.execute(
                "SELECT at, who, action, family, release, why FROM rollout_audit"
                " WHERE (? IS NULL OR family = ?) AND (? IS NULL OR release = ?) ORDER BY entry",
                (family, family, release, release),
            ).fetchall()
        names = ("at", "who", "action", "family", "release", "why")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _on_trial(self, family: str, action: str) -> Rollout:
        running = self.trial(family)
        if running is None:
            raise ConfigError(
                f"no release of {family} is on trial, so there is nothing to {action}; "
                f"begin with `symbiont release stage {family} RELEASE`"
            )
        return running

    def _last(self, family: str, state: State) -> Rollout | None:
        found = self._rows("family = ? AND state = ?", family, state)
        return found[-1] if found else None

    def _move(self, rollout: Rollout, state: State, action: str, who: str, why: str) -> Rollout:
        with self._store.transaction() as db:
            db.execute(
                "UPDATE rollouts SET state = ?, since = ?, why = ?, settled = 0 WHERE number = ?",
                (state, self._now(), why, rollout.number),
            )
            self._audit(action, rollout.family, rollout.release, who, why)
        return self._get(rollout.number)

    def _audit(self, action: str, family: str, release: str, who: str, why: str) -> None:
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO rollout_audit (at, who, action, family, release, why)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (self._now(), who, action, family, release, why),
            )

    def _get(self, number: int) -> Rollout:
        return self._rows("number = ?", number)[0]

    def _rows(self, where: str, *values: object) -> list[Rollout]:
        with self._store.transaction() as db:
            rows = db.execute(
                f"SELECT {_ROW} FROM rollouts WHERE {where} ORDER BY number", values
            ).fetchall()
        return [
            Rollout(
                number,
                of,
                release,
                before,
                State(state),
                msgspec.json.decode(plan, type=Plan),
                tuple(json.loads(canary)),
                since,
                why,
                bool(settled),
            )
            for number, of, release, before, state, plan, canary, since, why, settled in rows
        ]


def summary(rollout: Rollout) -> dict[str, Any]:
    """Return a roll-out as plain values."""
    shown = asdict(rollout)
    return {**shown, "state": str(rollout.state), "plan": msgspec.to_builtins(rollout.plan)}
