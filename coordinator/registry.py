"""Published releases: which exist, which is promoted, and what each was made from.

Knows the table `releases` and the signed repository. Does not know how a release was trained or
exported, nor how its files travel.
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from coordinator.programs import Publish, Release
from coordinator.store import Store
from edge_sdk.errors import ExportError, RemoteProtocolError
from exporters.publisher import Publisher

logger = logging.getLogger(__name__)


class Registry:
    """The releases of one coordinator; `publisher` holds keys, metadata and files."""

    def __init__(self, store: Store, publisher: Publisher, now: Callable[[], float]) -> None:
        self._store, self._publisher, self._now = store, publisher, now

    def prepare(self) -> None:
        """Create the signed repository and its keys if there is none."""
        if not self._publisher.exists:
            self._publisher.init()

    def root(self) -> bytes:
        """Return the TUF root metadata that devices are enrolled with."""
        return self._publisher.root()

    def publish(self, wish: Publish) -> Release:
        """Sign and promote a release. A name published before gives that release, unchanged.

        Raises:
            ExportError: the folder is not that release, or was altered since its export, or its
                base is not published.
        """
        found = self.release(wish.family, wish.release)
        if found is not None:
            return found
        if wish.base is not None and self.release(wish.family, wish.base) is None:
            raise ExportError(
                f"{wish.family}/{wish.release} builds on {wish.base}, which is not published; "
                "publish that release first"
            )
        # A crash between signing and recording: the signed release is there, only our row is not.
        known = self._publisher.releases().get(f"{wish.family}/{wish.release}")
        targets = known or self._publisher.publish(wish.family, wish.release, wish.folder)
        with self._store.transaction() as db:
            db.execute("UPDATE releases SET promoted = 0 WHERE family = ?", (wish.family,))
            db.execute(
                "INSERT INTO releases (family, release, base, targets, lineage, promoted, at)"
                " VALUES (?, ?, ?, ?, ?, 1, ?)",
                (
                    wish.family,
                    wish.release,
                    wish.base,
                    json.dumps(targets),
                    json.dumps(dict(wish.lineage), default=str),
                    self._now(),
                ),
            )
        logger.info("released %s/%s", wish.family, wish.release)
        return Release(wish.family, wish.release, tuple(targets), self._publisher.metadata())

    def release(self, family: str, release: str) -> Release | None:
        """Return a published release with the current metadata, or None."""
        return self._one("family = ? AND release = ?", (family, release))

    def promoted(self, family: str) -> Release | None:
        """Return the release that devices of `family` should run, or None before the first."""
        return self._one("family = ? AND promoted = 1", (family,))

    def _one(self, where: str, values: tuple[str, ...]) -> Release | None:
        with self._store.transaction() as db:
            row = db.execute(
                f"SELECT family, release, targets FROM releases WHERE {where}",
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

    def lineage(self, family: str | None = None) -> list[Mapping[str, Any]]:
        """Return every release, oldest first, with its base and what it was made from."""
        with self._store.transaction() as db:
            rows = db.execute(
                "SELECT family, release, base, lineage, promoted, at FROM releases"
                " WHERE ? IS NULL OR family = ? ORDER BY number",
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
            }
            for row in rows
        ]
