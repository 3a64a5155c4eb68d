"""Keys that change by the day, and devices that the operator approves or revokes meanwhile.

Knows the schedule of the epoch key, the retained bundle and what another process changed in the
database. Does not know programs or messages; the service calls `tick` a few times a second.

The epoch key is replaced every day. What was sealed for the old one still opens until the rounds
that were open at the change are closed, a quarter of an hour at least and a day at most; then its
private half is deleted, and what still arrives under it is refused with WRONG_KEY, upon which the
sender seals it anew for the key of the bundle. Nothing is lost by that, only sent twice.
"""

import logging

from coordinator.desk import Desk
from coordinator.events import Events
from edge_sdk.link.courier import Courier

logger = logging.getLogger(__name__)

DAY_S = 86_400.0
EPOCH_S = DAY_S
"""Age at which the epoch key is replaced: what is seized later opens a day at most."""
LONGEST_GRACE_S = DAY_S
SHORTEST_GRACE_S = 900.0
"""Below this, most of what is under way would have to be sent twice."""
BUNDLE_LASTS_S = 30 * DAY_S
BUNDLE_RENEW_S = DAY_S
"""The retained bundle lasts a month and is signed anew every day, so it also tells the time."""
_WANTED = "rotation_wanted"


class Warden:
    """Turns the keys of a running service and notices what commands did beside it."""

    def __init__(self, desk: Desk, courier: Courier, events: Events) -> None:
        self._desk, self._courier, self._events = desk, courier, events
        self._announced_s = 0.0
        self._seen_version = -1
        self._revoked = desk.fleet.revoked()

    def announce(self) -> None:
        """Retain the present keys on the broker, from now on and after each reconnect."""
        self._announced_s = self._desk.now()
        self._courier.announce_keys(self._desk.bundle(lasts_s=BUNDLE_LASTS_S))

    def tick(self) -> None:
        """Do what is due; a few times a second, cheap when nothing is.

        Raises:
            StorageError: the disk refuses; the next call tries again.
        """
        now_s, ring = self._desk.now(), self._desk.ring
        changed = self._changed_elsewhere()
        ring.note_made(now_s)
        if now_s - ring.made_s >= EPOCH_S or (changed and self._desk.recall(_WANTED)):
            self.rotate()
        elif abs(now_s - self._announced_s) > BUNDLE_RENEW_S:
            self.announce()
        if ring.retired:
            self._end_grace(now_s)
        self._look_at_devices()
        if changed:
            self._courier.nudge()

    def rotate(self, *, grace_s: float = LONGEST_GRACE_S) -> None:
        """Replace the epoch key now and announce the new one.

        Raises:
            StorageError: the disk refuses; the old key stays.
        """
        desk = self._desk
        with desk.store.transaction() as db:
            (last,) = db.execute("SELECT COALESCE(MAX(ask), 0) FROM asks").fetchone()
            desk.note("rotated_at_ask", last)
            desk.note(_WANTED, 0)
        desk.ring.prepare()
        desk.ring.confirm(desk.now(), grace_s=grace_s)
        self.announce()
        self._events("rotated", key=desk.identity.public.receive_id.hex())

    def _end_grace(self, now_s: float) -> None:
        ring = self._desk.ring
        if now_s - ring.made_s >= SHORTEST_GRACE_S and not self._rounds_before():
            ring.shorten(now_s)
        if ring.tidy(now_s):
            logger.info("an old epoch key was deleted")
            self._events("key_deleted")

    def _rounds_before(self) -> int:
        """How many tasks that were open at the last rotation still are."""
        with self._desk.store.transaction() as db:
            (count,) = db.execute(
                "SELECT COUNT(*) FROM asks WHERE state = 'open' AND ask <= ?",
                (self._desk.recall("rotated_at_ask"),),
            ).fetchone()
        return int(count)

    def _changed_elsewhere(self) -> bool:
        with self._desk.store.transaction() as db:
            (version,) = db.execute("PRAGMA data_version").fetchone()
        changed, self._seen_version = version != self._seen_version, version
        return bool(changed)

    def _look_at_devices(self) -> None:
        revoked = self._desk.fleet.revoked()
        for device in sorted(revoked - self._revoked):
            self._courier.forget(device)
            self._events("revoked", device=device)
        self._revoked = revoked


def want_rotation(desk: Desk) -> None:
    """Ask a service that runs in another process to replace its epoch key now."""
    desk.note(_WANTED, 1)
