"""What each device reads, and what it said it lacked of a task.

Knows the tables `abilities` and `lacking`. Does not know what the words mean
(`compression/formats.py`, `Refused.lacks`) or what is sent because of them.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

from coordinator.store import Store

SCHEMA = """
CREATE TABLE IF NOT EXISTS abilities (
  tenant TEXT NOT NULL, device TEXT NOT NULL, reads TEXT NOT NULL, PRIMARY KEY (tenant, device));
CREATE TABLE IF NOT EXISTS lacking (
  tenant TEXT NOT NULL, device TEXT NOT NULL, round TEXT NOT NULL, lacks TEXT NOT NULL,
  PRIMARY KEY (tenant, device));
"""


@dataclass(frozen=True, slots=True)
class Known:
    """Of one device and round: formats it reads, and what it lacked of that round's tasks."""

    reads: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()


About = Callable[[str, int], Known]
"""(device, round) -> what is known. It must not change while nothing arrives."""


def nothing_known(_device: str, _round: int) -> Known:
    """An `About` for devices of the first version."""
    return Known()


class Abilities:
    """Both tables of one tenant; joins the store's open transaction."""

    def __init__(self, store: Store, *, tenant: str) -> None:
        self._store, self._tenant = store, tenant
        store.mailbox.create(SCHEMA)

    def learn(self, device: str, reads: Collection[str]) -> None:
        """Note what `device` says it reads; what it said before is forgotten."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO abilities VALUES (?, ?, ?)",
                (self._tenant, device, json.dumps(sorted(reads))),
            )

    def lack(self, device: str, round_: str, lacks: Collection[str]) -> None:
        """Note what `device` lacked of `round_`'s tasks, beside what it lacked of them before.

        So a device that lacks two things, and says so one by one, is sent both. Only its newest
        round is kept.
        """
        with self._store.transaction() as db:
            both = self.lacked(device, round_) | set(lacks)
            db.execute(
                "INSERT OR REPLACE INTO lacking VALUES (?, ?, ?, ?)",
                (self._tenant, device, round_, json.dumps(sorted(both))),
            )

    def about(self, device: str, round_: int) -> Known:
        """What is known of `device` for this round's task."""
        with self._store.transaction() as db:
            row = db.execute(
                "SELECT reads FROM abilities WHERE tenant = ? AND device = ?",
                (self._tenant, device),
            ).fetchone()
        reads = frozenset(json.loads(row[0])) if row else frozenset()
        return Known(reads, self.lacked(device, str(round_)))

    def lacked(self, device: str, round_: str) -> frozenset[str]:
        """What `device` lacked of this round's tasks."""
        with self._store.transaction() as db:
            row = db.execute(
                "SELECT lacks FROM lacking WHERE tenant = ? AND device = ? AND round = ?",
                (self._tenant, device, round_),
            ).fetchone()
        return frozenset(json.loads(row[0])) if row else frozenset()
