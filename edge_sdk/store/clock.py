"""What time it is at least, by the coordinator's signatures and not by this machine's clock.

Knows the newest signed time and a monotonic clock. Does not know who signed, nor where it is kept.

A device's clock may be years off, run backwards or be set by whoever holds the device, so nothing
is judged by it. The coordinator signs the time into every message and key bundle; the newest of
these, plus the seconds that have passed here since it was heard, is never later than the true
time. What has expired by it has expired; what has not may be accepted a little late, and a device
that heard nothing for a month believes that it is last month until the retained bundle arrives.
"""

import threading
import time
from collections.abc import Callable

from edge_sdk.errors import RemoteProtocolError

KEEP_EVERY_S = 600.0
"""How much time a restart may forget; the next signed message brings it back."""
LAST_S = 253_402_300_799.0
"""The end of the year 9999, the last that dates can hold."""


def since_start() -> float:
    """Return a monotonic clock in seconds that counts sleep too where the system can."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class SignedTime:
    """A clock that only signatures move, forwards. Call it for seconds since 1970, UTC.

    `floor_s` is what an earlier run knew, `keep` is called with what the next should know.
    `clock` is monotonic.
    """

    def __init__(
        self,
        *,
        floor_s: float = 0.0,
        keep: Callable[[float], None] | None = None,
        clock: Callable[[], float] = since_start,
    ) -> None:
        self._clock, self._keep = clock, keep
        self._lock = threading.Lock()
        self._signed_s, self._heard_at = floor_s, clock()
        self._kept_s = floor_s

    def __call__(self) -> float:
        """Return the time; it never falls and is never ahead of the coordinator's clock."""
        with self._lock:
            return self._now()

    def _now(self) -> float:
        return self._signed_s + max(0.0, self._clock() - self._heard_at)

    @property
    def known(self) -> bool:
        """Whether any signed time was ever heard."""
        return self._signed_s > 0

    def heard(self, signed_s: float) -> None:
        """Count a time whose signature was verified; an older one than ours changes nothing.

        Raises:
            RemoteProtocolError: no time that a calendar has.
        """
        if not 0 <= signed_s <= LAST_S:
            raise RemoteProtocolError(f"{signed_s} is not a time; its sender's clock is broken")
        with self._lock:
            if signed_s > self._now():
                self._signed_s, self._heard_at = float(signed_s), self._clock()
        self.keep()

    def keep(self) -> None:
        """Hand the time to `keep` if enough of it has passed."""
        with self._lock:
            now_s = self._now()
            due = self._keep is not None and now_s - self._kept_s >= KEEP_EVERY_S
            if due:
                self._kept_s = now_s
        if due and self._keep is not None:
            self._keep(now_s)
