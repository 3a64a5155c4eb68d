"""The book of roll-outs: which release is tried on which devices, and who decided what.

Knows the tables `rollouts` and `rollout_audit`, and which step may follow which; what was offered
to devices is kept along with it (rollout_offers.py). Does not know messages: `staging.py` carries
out what stands here, in the running service; commands in other processes only write here.

    staged -> measuring -> canary -> promoted
                 |            |          |
                 +-- paused --+          |      (stage again goes on, promote skips the rest)
                 +------------+----------+-> rolled-back        withdrawn: for good
"""

import json
import math
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import msgspec

from coordinator.registry import Registry
from coordinator.rollout_offers import Offered, Offers
from coordinator.rollout_plan import OPEN, Plan, Rollout, State, summary
from coordinator.store import Store
from edge_sdk.errors import ConfigError

__all__ = ["OPEN", "SERVICE", "Book", "Offered", "Plan", "Rollout", "State", "summary"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS rollouts (
  number INTEGER PRIMARY KEY AUTOINCREMENT, family TEXT NOT NULL, release TEXT NOT NULL,
  before TEXT, state TEXT NOT NULL, plan TEXT NOT NULL, canary TEXT NOT NULL DEFAULT '[]',
  since REAL NOT NULL, why TEXT NOT NULL, settled INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS rollout_audit (
  entry INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, who TEXT NOT NULL,
  action TEXT NOT NULL, family TEXT NOT NULL, release TEXT NOT NULL, why TEXT NOT NULL);
"""
SERVICE = "service"
"""Who decided, where the service did so by itself."""


_ROW = "number, family, release, before, state, plan, canary, since, why, settled"


class Book(Offers):
    """All roll-outs of a coordinator; every change is one transaction with its audit line."""

    def __init__(self, store: Store, registry: Registry, now: Callable[[], float]) -> None:
        super().__init__(store, now)
        self._registry = registry
        store.mailbox.create(SCHEMA)

    # --- what people decide -------------------------------------------------------------------

    def stage(self, family: str, release: str, plan: Plan, *, who: str, why: str = "") -> Rollout:
        """Begin to try `release`, or go on with a paused trial of it.

        Raises:
            ConfigError: no such release, it runs already, or another is on trial.
        """
        self._registry.require(family, release)
        with self._store.transaction():
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
            self._audit("stage", family, release, who, why)
            return self._enter(family, release, before, State.STAGED, plan, why)

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
                running = self._enter(family, promoted, target, State.PROMOTED, Plan(), why)
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

    def _enter(
        self,
        family: str,
        release: str | None,
        before: str | None,
        state: State,
        plan: Plan,
        why: str,
    ) -> Rollout:
        words = msgspec.json.encode(plan).decode()
        with self._store.transaction() as db:
            number = db.execute(
                "INSERT INTO rollouts (family, release, before, state, plan, since, why)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (family, release, before, state, words, self._now(), why),
            ).lastrowid
        return self._get(int(number or 0))

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
