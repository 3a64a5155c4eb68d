"""The coordinator's own tables, in the mailbox's SQLite file so that one transaction spans both.

Knows runs, asks, consumed replies, commits and events. Does not know programs, devices' keys
(`fleet.py`) or model files (`registry.py`); those two keep their tables here through `transaction`.

The promise everything rests on: `commit` stores a step's state, marks the letters it used as
consumed and read, and closes their asks, all in one transaction. A letter is in exactly one
committed step or still waiting; `consumed` and `refused` are the record of it. `counted` has one
row per (tenant, device, run, round, kind): whatever a program does, a device counts once a round.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from coordinator.programs import Commit
from edge_sdk.store.mailbox import Mailbox

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  run TEXT PRIMARY KEY, started REAL NOT NULL, finished REAL, error TEXT);
CREATE TABLE IF NOT EXISTS asks (
  ask INTEGER PRIMARY KEY, run TEXT NOT NULL, device TEXT NOT NULL,
  kind TEXT NOT NULL, digest BLOB NOT NULL, task TEXT NOT NULL, expected TEXT NOT NULL,
  step INTEGER NOT NULL, state TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS asks_by_task ON asks (task);
CREATE INDEX IF NOT EXISTS asks_by_words ON asks (run, device, digest, state);
CREATE TABLE IF NOT EXISTS consumed (
  letter INTEGER PRIMARY KEY, run TEXT NOT NULL, step INTEGER NOT NULL, ask INTEGER NOT NULL,
  device TEXT NOT NULL, kind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counted (
  tenant TEXT NOT NULL, device TEXT NOT NULL, run TEXT NOT NULL, round TEXT NOT NULL,
  kind TEXT NOT NULL, letter INTEGER NOT NULL UNIQUE, step INTEGER NOT NULL,
  PRIMARY KEY (tenant, device, run, round, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refused (
  letter INTEGER PRIMARY KEY, device TEXT NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL,
  at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS commits (
  run TEXT NOT NULL, step INTEGER NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (run, step));
CREATE TABLE IF NOT EXISTS states (
  run TEXT NOT NULL, step INTEGER NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL,
  PRIMARY KEY (run, step, name));
CREATE TABLE IF NOT EXISTS events (
  event INTEGER PRIMARY KEY AUTOINCREMENT, line TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tokens (
  token TEXT PRIMARY KEY, tenant TEXT NOT NULL, device TEXT NOT NULL, secret_hash BLOB NOT NULL,
  created REAL NOT NULL, expires REAL NOT NULL, used REAL);
CREATE TABLE IF NOT EXISTS devices (
  tenant TEXT NOT NULL, device TEXT NOT NULL, identity_key BLOB NOT NULL, receive_key BLOB NOT NULL,
  state TEXT NOT NULL, families TEXT NOT NULL, memory_mb INTEGER NOT NULL, enrolled REAL NOT NULL,
  last_seen REAL NOT NULL, faults INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (tenant, device));
CREATE TABLE IF NOT EXISTS releases (
  number INTEGER PRIMARY KEY AUTOINCREMENT, family TEXT NOT NULL, release TEXT NOT NULL,
  base TEXT, targets TEXT NOT NULL, lineage TEXT NOT NULL, promoted INTEGER NOT NULL,
  at REAL NOT NULL, UNIQUE (family, release));
"""


@dataclass(frozen=True, slots=True)
class AskRow:
    """One task for one device. `state`: open, told (no reply awaited), refused, excused (the
    device did it and may not send the outcome; it is not asked again), or closed.

    `round`: what a device may answer once; the task's round where it names one, else its own id.
    """

    ask: int
    run: str
    device: str
    kind: str
    task: str
    expected: str
    step: int
    state: str

    @property
    def round(self) -> str:
        """The round that a reply to this task counts for."""
        found = json.loads(self.expected).get("round") if self.expected else None
        return self.task if found is None else str(found)


_ASK_COLUMNS = "ask, run, device, kind, task, expected, step, state"


class Store:
    """The coordinator's tables. Thread-safe, like the mailbox whose file and lock it shares."""

    def __init__(self, mailbox: Mailbox, now: Callable[[], float]) -> None:
        self.mailbox = mailbox
        self._now = now
        mailbox.create(SCHEMA)

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """Return the mailbox's transaction: all statements within are stored, or none."""
        return self.mailbox.transaction()

    # --- runs and commits ---------------------------------------------------------------------

    def start_run(self, run: str) -> None:
        """Record that `run` exists; a second time changes nothing."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO runs (run, started) VALUES (?, ?)", (run, self._now())
            )

    def finish_run(self, run: str, error: str | None = None) -> None:
        """Record that `run` ended, with the reason if it failed."""
        with self.transaction() as db:
            db.execute(
                "UPDATE runs SET finished = ?, error = ? WHERE run = ?", (self._now(), error, run)
            )

    def finished(self, run: str) -> bool:
        """Say whether `run` ended without an error."""
        with self.transaction() as db:
            row = db.execute(
                "SELECT finished FROM runs WHERE run = ? AND error IS NULL", (run,)
            ).fetchone()
        return row is not None and row[0] is not None

    def runs(self) -> list[dict[str, Any]]:
        """Return each run with its state and number of commits, oldest first."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT run, finished, error, (SELECT COUNT(*) FROM commits c WHERE c.run = r.run)"
                " FROM runs r ORDER BY started"
            ).fetchall()
        return [
            {
                "run": run,
                "state": "open" if finished is None else error or "finished",
                "commits": commits,
            }
            for run, finished, error, commits in rows
        ]

    def last_commit(self, run: str) -> Commit | None:
        """Return the newest commit of `run` with its state, or None before the first."""
        with self.transaction() as db:
            (step,) = db.execute("SELECT MAX(step) FROM commits WHERE run = ?", (run,)).fetchone()
            if step is None:
                return None
            state = db.execute(
                "SELECT name, data FROM states WHERE run = ? AND step = ?", (run, step)
            ).fetchall()
        return Commit(step, {name: bytes(data) for name, data in state})

    def commit(self, run: str, commit: Commit, used: Iterable[tuple[int, int]]) -> None:
        """Store `commit` and consume `used`, pairs (letter id, ask), in one transaction.

        Only the newest state is kept; the digests of all stay, as the run's history.
        """
        with self.transaction() as db:
            db.execute(
                "INSERT INTO commits (run, step, digest, at) VALUES (?, ?, ?, ?)",
                (run, commit.step, state_digest(commit.state), self._now()),
            )
            db.execute("DELETE FROM states WHERE run = ?", (run,))
            db.executemany(
                "INSERT INTO states (run, step, name, data) VALUES (?, ?, ?, ?)",
                [(run, commit.step, name, data) for name, data in commit.state.items()],
            )
            for letter, ask in used:
                db.execute(
                    "INSERT INTO consumed (letter, run, step, ask, device, kind)"
                    " SELECT ?, run, ?, ask, device, kind FROM asks WHERE ask = ?",
                    (letter, commit.step, ask),
                )
                row = self._asks(db, "ask = ?", ask)[0]
                db.execute(
                    "INSERT INTO counted SELECT tenant, sender, ?, ?, ?, id, ? FROM letters"
                    " WHERE id = ?",
                    (run, row.round, row.kind, commit.step, letter),
                )
                db.execute("UPDATE asks SET state = 'closed' WHERE ask = ?", (ask,))
                self.mailbox.mark_read(letter)
            db.execute(
                "UPDATE asks SET state = 'closed' WHERE run = ?"
                " AND state IN ('told', 'refused', 'excused')",
                (run,),
            )

    def counted(self, row: AskRow) -> bool:
        """Say whether the device has counted in this task's round already."""
        with self.transaction() as db:
            found = db.execute(
                "SELECT 1 FROM counted WHERE device = ? AND run = ? AND round = ? AND kind = ?",
                (row.device, row.run, row.round, row.kind),
            ).fetchone()
        return found is not None

    def commits_since(self, run: str, step: int) -> int:
        """Return how many commits of `run` are of `step` or later."""
        with self.transaction() as db:
            (count,) = db.execute(
                "SELECT COUNT(*) FROM commits WHERE run = ? AND step >= ?", (run, step)
            ).fetchone()
        return int(count)

    # --- asks ---------------------------------------------------------------------------------

    def ask(
        self,
        run: str,
        device: str,
        *,
        kind: str,
        digest: bytes,
        expected: str,
        step: int,
        state: str,
    ) -> tuple[AskRow, bool]:
        """Return the ask of `device` in these words that is not closed, and False; or a new one
        and True.

        Its `step` becomes `step`: asked again in the same words, it is a task of this step.
        """
        with self.transaction() as db:
            row = db.execute(
                "UPDATE asks SET step = ? WHERE run = ? AND device = ? AND digest = ?"
                " AND state != 'closed' RETURNING ask",
                (step, run, device, digest),
            ).fetchone()
            if row is not None:
                return self._asks(db, "ask = ?", row[0])[0], False
            (number,) = db.execute("SELECT COALESCE(MAX(ask), 0) + 1 FROM asks").fetchone()
            db.execute(
                "INSERT INTO asks (ask, run, device, kind, digest, task, expected, step, state)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    run,
                    device,
                    kind,
                    digest,
                    f"{kind.lower()}-{number}",
                    expected,
                    step,
                    state,
                ),
            )
            return self._asks(db, "ask = ?", number)[0], True

    def set_ask_state(self, ask: int, state: str) -> None:
        """Record that a device refused the task, or that it is closed."""
        with self.transaction() as db:
            db.execute("UPDATE asks SET state = ? WHERE ask = ?", (state, ask))

    def refuse_ask(self, task: str, device: str) -> None:
        """Record that nothing useful will come for `task`, if it is an open one of `device`."""
        with self.transaction() as db:
            db.execute(
                "UPDATE asks SET state = 'refused' WHERE task = ? AND device = ?"
                " AND state = 'open'",
                (task, device),
            )

    def close_refused(self, run: str) -> None:
        """Close refused asks, so that asking again in the same words sends them again."""
        with self.transaction() as db:
            db.execute(
                "UPDATE asks SET state = 'closed' WHERE run = ? AND state = 'refused'", (run,)
            )

    def ask_of_task(self, task: str) -> AskRow | None:
        """Return the ask with the task id `task`, or None if there never was one."""
        with self.transaction() as db:
            rows = self._asks(db, "task = ?", task)
        return rows[0] if rows else None

    @staticmethod
    def _asks(db: sqlite3.Connection, where: str, value: object) -> list[AskRow]:
        rows = db.execute(f"SELECT {_ASK_COLUMNS} FROM asks WHERE {where}", (value,))
        return [AskRow(*row) for row in rows]

    # --- letters, and events ------------------------------------------------------------------

    def letters(self, *, after: int) -> list[tuple[int, str, bytes]]:
        """Return (id, sender, message) of the unread letters with an id above `after`.

        Replies stay unread until the Commit that uses them, so the mailbox's own list, with all
        their bytes, would be read again with every arrival.
        """
        unread = self.mailbox.unread(after=after)
        return [(letter.id, letter.sender, letter.message) for letter in unread]

    def refuse(self, letter: int, device: str, kind: str, reason: str) -> None:
        """Mark a letter as read without using it, and record why."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO refused (letter, device, kind, reason, at)"
                " VALUES (?, ?, ?, ?, ?)",
                (letter, device, kind, reason, self._now()),
            )
            self.mailbox.mark_read(letter)

    def add_event(self, line: str) -> None:
        """Keep one event line."""
        with self.transaction() as db:
            db.execute("INSERT INTO events (line) VALUES (?)", (line,))

    def events(self, *, last: int = 1000) -> list[dict[str, Any]]:
        """Return the newest `last` events, oldest first."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT line FROM events ORDER BY event DESC LIMIT ?", (last,)
            ).fetchall()
        return [json.loads(line) for (line,) in reversed(rows)]


def state_digest(state: Mapping[str, bytes]) -> str:
    """Return the SHA-256 (hex) of a program's state; names and lengths are part of it."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{len(name)}:{name}{len(state[name])}:".encode())
        digest.update(state[name])
    return digest.hexdigest()
