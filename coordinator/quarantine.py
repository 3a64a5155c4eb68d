"""Who sent what it should not have, when and why; and who is left out for it, until when.

Knows faults, how many are too many, and the time-out they earn. Does not know messages or keys. The
device's state and count are columns of the fleet's table, changed here in the same transaction; an
enrolment or `Fleet.approve` sets the count to 0 and so lifts a quarantine.

A fault is something that no honest device does: malformed, not finite, of another task, out of all
proportion. Late, expired and repeated messages are not faults, and neither is a task refused.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.store import Store

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS faults (
  fault INTEGER PRIMARY KEY, tenant TEXT NOT NULL, device TEXT NOT NULL, at REAL NOT NULL,
  step TEXT NOT NULL, reason TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS faults_by_device ON faults (tenant, device, at);
CREATE TABLE IF NOT EXISTS quarantine (
  tenant TEXT NOT NULL, device TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL,
  reason TEXT NOT NULL, PRIMARY KEY (tenant, device));
"""

KEPT_FAULTS = 200
"""Faults remembered per device; a flood of them fills no disk."""
REASON_CHARS = 300
"""A reason is kept this far: parts of it may be the device's own words."""


@dataclass(frozen=True, slots=True)
class FaultRule:
    """`faults` within `within_s` seconds put a device aside for `lasts_s`; 0: until lifted."""

    faults: int = 5
    within_s: float = 7 * 86_400.0
    lasts_s: float = 0.0


class Quarantine:
    """Faults and time-outs of one tenant's devices."""

    def __init__(
        self, store: Store, *, tenant: str, now: Callable[[], float], rule: FaultRule | None = None
    ) -> None:
        self._store, self._tenant, self._now = store, tenant, now
        self.rule = rule or FaultRule()
        store.mailbox.create(SCHEMA)

    def fault(self, device: str, step: str = "reply", reason: str = "") -> bool:
        """Count a fault found at `step`; return whether it put the device in quarantine."""
        now, rule = self._now(), self.rule
        with self._store.transaction() as db:
            row = db.execute(
                "UPDATE devices SET faults = faults + 1 WHERE tenant = ? AND device = ?"
                " RETURNING faults",
                (self._tenant, device),
            ).fetchone()
            if row is None:
                return False  # not one of ours: there is nobody to hold it against
            db.execute(
                "INSERT INTO faults (tenant, device, at, step, reason) VALUES (?, ?, ?, ?, ?)",
                (self._tenant, device, now, step, reason[:REASON_CHARS]),
            )
            db.execute(
                "DELETE FROM faults WHERE tenant = ? AND device = ? AND fault NOT IN (SELECT fault"
                " FROM faults WHERE tenant = ? AND device = ? ORDER BY fault DESC LIMIT ?)",
                (self._tenant, device, self._tenant, device, max(KEPT_FAULTS, rule.faults)),
            )
            (count,) = db.execute(
                "SELECT COUNT(*) FROM faults WHERE tenant = ? AND device = ? AND at >= ?",
                (self._tenant, device, now - rule.within_s),
            ).fetchone()
            if min(count, row[0]) < rule.faults:
                return False
            changed = db.execute(
                "UPDATE devices SET state = 'quarantined' WHERE tenant = ? AND device = ?"
                " AND state = 'active'",
                (self._tenant, device),
            ).rowcount
            if changed:
                until = now + rule.lasts_s if rule.lasts_s > 0 else 0.0
                db.execute(
                    "INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?, ?)",
                    (self._tenant, device, now, until, reason[:REASON_CHARS]),
                )
        return changed == 1

    def expire(self) -> None:
        """Let those take part again whose time is over."""
        with self._store.transaction() as db:
            over = db.execute(
                "DELETE FROM quarantine WHERE tenant = ? AND until > 0 AND until <= ?"
                " RETURNING device",
                (self._tenant, self._now()),
            ).fetchall()
            for (device,) in over:
                db.execute(
                    "UPDATE devices SET state = 'active', faults = 0 WHERE tenant = ?"
                    " AND device = ? AND state = 'quarantined'",
                    (self._tenant, device),
                )
                logger.info("%s may take part again", device)

    def of(self, device: str) -> dict[str, Any]:
        """Return {"last_fault", "steps": {step: faults kept}, "quarantined_until"} of a device.

        The time is in seconds since 1970; 0 stands for no end, None for not in quarantine.
        """
        with self._store.transaction() as db:
            steps = db.execute(
                "SELECT step, COUNT(*) FROM faults WHERE tenant = ? AND device = ? GROUP BY step",
                (self._tenant, device),
            ).fetchall()
            last = db.execute(
                "SELECT reason FROM faults WHERE tenant = ? AND device = ? ORDER BY fault DESC",
                (self._tenant, device),
            ).fetchone()
            row = db.execute(
                "SELECT until FROM quarantine JOIN devices USING (tenant, device)"
                " WHERE tenant = ? AND device = ? AND state = 'quarantined'",
                (self._tenant, device),
            ).fetchone()
        return {
            "last_fault": last[0] if last else "",
            "steps": dict(steps),
            "quarantined_until": row[0] if row else None,
        }
