"""Which release was offered to which device in a roll-out, and what the device said.

Knows the table `rollout_offers`. Does not know why anything is offered.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coordinator.store import Store

SCHEMA = """
CREATE TABLE IF NOT EXISTS rollout_offers (
  number INTEGER NOT NULL, purpose TEXT NOT NULL, device TEXT NOT NULL, release TEXT NOT NULL,
  state TEXT NOT NULL, task TEXT NOT NULL DEFAULT '', tries INTEGER NOT NULL DEFAULT 0,
  accuracy REAL, examples INTEGER, tokens_per_s REAL, reason TEXT NOT NULL DEFAULT '',
  at REAL NOT NULL, PRIMARY KEY (number, purpose, device, release));
CREATE INDEX IF NOT EXISTS rollout_offers_by_task ON rollout_offers (task);
CREATE INDEX IF NOT EXISTS rollout_offers_by_device ON rollout_offers (device, at);
"""


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


_OFFER = (
    "number, purpose, device, release, state, task, tries, accuracy, examples, tokens_per_s,"
    " reason, at"
)


class Offers:
    """What was offered in all roll-outs."""

    def __init__(self, store: Store, now: Callable[[], float]) -> None:
        self._store, self._now = store, now
        store.mailbox.create(SCHEMA)

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
