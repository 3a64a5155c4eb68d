"""Published releases: which exist, which is promoted, who may run which, what each was made from.

Knows the tables `releases`, `assignments` and `withdrawn`, and the signed repository. Does not know
how a release was trained or exported, how its files travel, or when one is promoted (`rollout.py`).

A device may run the promoted release of its family, the release below it, what `allow` lets
everyone run beside it, and what `assign` gives to this device. `direct` signs just that.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from coordinator.programs import Publish, Release
from coordinator.store import Store
from edge_sdk.errors import ConfigError, ExportError, RemoteProtocolError
from exporters.publisher import Publisher

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS assignments (
  family TEXT NOT NULL, device TEXT NOT NULL, release TEXT NOT NULL,
  PRIMARY KEY (family, device, release));
CREATE TABLE IF NOT EXISTS withdrawn (
  family TEXT NOT NULL, release TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (family, release));
"""
_SOUND = (
    "NOT EXISTS (SELECT 1 FROM withdrawn w WHERE w.family = r.family AND w.release = r.release)"
)


class Registry:
    """The releases of one coordinator; `publisher` holds keys, metadata and files."""

    def __init__(self, store: Store, publisher: Publisher, now: Callable[[], float]) -> None:
        self._store, self._publisher, self._now = store, publisher, now
        self._directed: dict[str, object] = {}
        store.mailbox.create(_SCHEMA)

    def prepare(self) -> None:
        """Create the signed repository and its keys if there is none."""
        if not self._publisher.exists:
            self._publisher.init()

    def root(self) -> bytes:
        """Return the TUF root metadata that devices are enrolled with."""
        return self._publisher.root()

    def refresh(self) -> bool:
        """Sign again what is half expired; return whether anything was."""
        return self._publisher.refresh()

    def publish(self, wish: Publish, *, promote: bool = True) -> Release:
        """Sign a release and promote it. A name published before gives that release, unchanged.

        `promote=False`: nobody may run it until it is staged or promoted.

        Raises:
            ExportError: the folder is not that release, or was altered since its export, its
                base is not published, or the release was withdrawn.
        """
        found = self.release(wish.family, wish.release)
        if found is not None:
            return found
        if self.is_withdrawn(wish.family, wish.release):
            raise ExportError(
                f"{wish.family}/{wish.release} was withdrawn; publish it under a new name"
            )
        if wish.base is not None and self.release(wish.family, wish.base) is None:
            raise ExportError(
                f"{wish.family}/{wish.release} builds on {wish.base}, which is not published; "
                "publish that release first"
            )
        # A crash between signing and recording: the signed release is there, only our row is not.
        known = self._publisher.releases().get(f"{wish.family}/{wish.release}")
        targets = known or self._publisher.publish(
            wish.family, wish.release, wish.folder, everyone=promote
        )
        with self._store.transaction() as db:
            if promote:
                db.execute("UPDATE releases SET promoted = 0 WHERE family = ?", (wish.family,))
            db.execute(
                "INSERT INTO releases (family, release, base, targets, lineage, promoted, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    wish.family,
                    wish.release,
                    wish.base,
                    json.dumps(targets),
                    json.dumps(dict(wish.lineage), default=str),
                    int(promote),
                    self._now(),
                ),
            )
        self.direct(wish.family)
        logger.info("released %s/%s", wish.family, wish.release)
        return Release(wish.family, wish.release, tuple(targets), self._publisher.metadata())

    # --- who may run which --------------------------------------------------------------------

    def promote(self, family: str, release: str) -> None:
        """Record that devices of `family` should run `release`; `direct` then signs it.

        Raises:
            ConfigError: there is no such release, or it was withdrawn.
        """
        self.require(family, release)
        with self._store.transaction() as db:
            db.execute(
                "UPDATE releases SET promoted = (release = ?) WHERE family = ?", (release, family)
            )

    def assign(self, family: str, release: str, devices: Iterable[str]) -> None:
        """Record that `devices` may run `release` beside what all may; `direct` then signs it."""
        with self._store.transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO assignments VALUES (?, ?, ?)",
                [(family, device, release) for device in devices],
            )

    def allow(self, family: str, release: str) -> None:
        """Let everyone run `release` beside the promoted one: a program works on it."""
        self.assign(family, release, ("",))
        self.direct(family)

    def unassign(self, family: str, release: str) -> None:
        """Record that nobody may run `release` any more, unless it is promoted."""
        with self._store.transaction() as db:
            db.execute(
                "DELETE FROM assignments WHERE family = ? AND release = ?", (family, release)
            )

    def direct(self, family: str) -> bool:
        """Sign who may run what, if it changed since it was last signed."""
        with self._store.transaction() as db:
            rows = db.execute(
                "SELECT device, release FROM assignments r WHERE family = ? AND " + _SOUND,
                (family,),
            ).fetchall()
            promoted = db.execute(
                "SELECT release FROM releases r WHERE family = ? AND promoted = 1 AND " + _SOUND,
                (family,),
            ).fetchall()
        everyone = {release for (release,) in promoted}
        everyone |= {release for device, release in rows if not device}
        everyone |= {base for release in everyone if (base := self.base_of(family, release))}
        devices: dict[str, list[str]] = {}
        for device, release in sorted(rows):
            if device:
                below = self.base_of(family, release)
                devices.setdefault(device, []).extend([release, *([below] if below else [])])
        wanted = (sorted(everyone), devices)
        if self._directed.get(family) == wanted:
            return False
        changed = self._publisher.assign(family, sorted(everyone), devices)
        self._directed[family] = wanted
        return changed

    def withdraw(self, family: str, release: str) -> None:
        """Take a release back for good: devices neither install nor load it any more.

        Raises:
            ConfigError: there is no such release; or it is promoted, or others build on it.
            ExportError: the targets key is not here.
        """
        self.require(family, release)
        promoted = self._names("promoted = 1", family)
        if release in promoted:
            raise ConfigError(
                f"{family}/{release} is what devices run; roll back or promote another first"
            )
        above = self._names("base = ?", family, release)
        if above:
            raise ConfigError(
                f"{family}/{release} is the base of {', '.join(above)}; withdraw those first"
            )
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO withdrawn VALUES (?, ?, ?)", (family, release, self._now())
            )
            self.unassign(family, release)
            if f"{family}/{release}" in self._publisher.releases():
                self._publisher.withdraw(family, release)
        self._directed.pop(family, None)

    def take_back(self, family: str, release: str, *, instead: str, reason: str) -> Release:
        """Promote `instead` again, withdraw `release` and write why; again changes nothing.

        Raises:
            ConfigError: there is no release `instead`.
        """
        if not self.is_withdrawn(family, release):
            self.promote(family, instead)
            with self._store.transaction() as db:
                db.execute(
                    "UPDATE releases SET lineage = json_set(lineage, '$.rolled_back', ?)"
                    " WHERE family = ? AND release = ?",
                    (reason, family, release),
                )
            try:
                self.withdraw(family, release)
            except (
                ConfigError,
                ExportError,
            ) as exc:  # e.g. its key is offline
                logger.warning("%s/%s is not promoted but stays: %s", family, release, exc)
        self.direct(family)
        found = self.release(family, instead)
        if found is None:
            raise ConfigError(f"there is no release {family}/{instead} to return to")
        return found

    # --- what there is ------------------------------------------------------------------------

    def require(self, family: str, release: str) -> None:
        """Check that a release can be offered.

        Raises:
            ConfigError: there is no such release, or it was withdrawn; names those there are.
        """
        names = self._names("1 = 1", family)
        if release not in names:
            if self.is_withdrawn(family, release):
                raise ConfigError(f"{family}/{release} was withdrawn; stage another release")
            known = ", ".join(names) or "none; publish one with --bundle"
            raise ConfigError(f"there is no release {family}/{release}; there are: {known}")

    def is_withdrawn(self, family: str, release: str) -> bool:
        """Say whether the release was taken back."""
        with self._store.transaction() as db:
            row = db.execute(
                "SELECT 1 FROM withdrawn WHERE family = ? AND release = ?", (family, release)
            ).fetchone()
        return row is not None

    def base_of(self, family: str, release: str) -> str | None:
        """Return the release that `release` builds on, None for a whole one."""
        with self._store.transaction() as db:
            row = db.execute(
                "SELECT base FROM releases WHERE family = ? AND release = ?", (family, release)
            ).fetchone()
        return row[0] if row else None

    def before(self, family: str) -> str | None:
        """Return the newest sound release of `family` older than the promoted one."""
        names = self._names("1 = 1", family)
        promoted = self._names("promoted = 1", family)
        older = names[: names.index(promoted[0])] if promoted else []
        return older[-1] if older else None

    def promoted_name(self, family: str) -> str | None:
        """Return the name of the promoted release, without reading its metadata."""
        names = self._names("promoted = 1", family)
        return names[0] if names else None

    def release(self, family: str, release: str) -> Release | None:
        """Return a published release with the current metadata, or None."""
        return self._one("family = ? AND release = ?", (family, release))

    def promoted(self, family: str) -> Release | None:
        """Return the release that devices of `family` should run, or None before the first."""
        return self._one("family = ? AND promoted = 1", (family,))

    def _names(self, where: str, family: str, *values: str) -> list[str]:
        with self._store.transaction() as db:
            rows = db.execute(
                f"SELECT release FROM releases r WHERE family = ? AND {where} AND {_SOUND}"
                " ORDER BY number",
                (family, *values),
            ).fetchall()
        return [release for (release,) in rows]

    def _one(self, where: str, values: tuple[str, ...]) -> Release | None:
        with self._store.transaction() as db:
            row = db.execute(
                f"SELECT family, release, targets FROM releases r WHERE {where} AND {_SOUND}",
                values,
            ).fetchone()
        if row is None:
            return None
        family, release, targets = row
        return Release(family, release, tuple(json.loads(targets)), self._publisher.metadata())

    def read(self, path: str) -> bytes:
        """Return the bytes of a published target file.

        Raises:
            RemoteProtocolError: no published release has such a file.
        """
        try:
            return self._publisher.read(path)
        except (ExportError, OSError) as exc:
            raise RemoteProtocolError(f"{path[:200]!r} is not a published file") from exc

    def file(self, path: str) -> Path:
        """Return where a published target file lies, to be sent piece by piece.

        Raises:
            RemoteProtocolError: no published release has such a file.
        """
        try:
            return self._publisher.file(path)
        except ExportError as exc:
            raise RemoteProtocolError(f"{path[:200]!r} is not a published file") from exc

    def lineage(self, family: str | None = None) -> list[Mapping[str, Any]]:
        """Return every release, oldest first, with its base and what it was made from."""
        with self._store.transaction() as db:
            rows = db.execute(
                f"SELECT family, release, base, lineage, promoted, at, NOT {_SOUND}"
                " FROM releases r WHERE ? IS NULL OR family = ? ORDER BY number",
                (family, family),
            ).fetchall()
        return [
            {
                "family": row[0],
                "release": row[1],
                "base": row[2],
                "lineage": json.loads(row[3]),
                "promoted": bool(row[4]),
                "at": row[5],
                "withdrawn": bool(row[6]),
            }
            for row in rows
        ]
