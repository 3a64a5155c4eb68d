"""What a device knows of its coordinator's keys, and from when on.

Knows the retained key bundle, its version and how to wait for it. Does not know topics or files:
the courier hands bundles in, and `keep` may write one down.
"""

import threading
from collections.abc import Callable

from edge_sdk.errors import EnrolmentError, FleetError, LinkError, RemoteProtocolError
from edge_sdk.link.passwords import COORDINATOR
from edge_sdk.wire.enrolment import KeyBundle
from edge_sdk.wire.seal import PublicIdentity


class CoordinatorKeys:
    """The newest bundle that the root key of our enrolment code has signed.

    Give `lookup` and `receive` to a device's Courier as `lookup=` and `keys=`. `bundle` is what an
    earlier run kept; when it cannot be believed any more, the retained one is waited for. `now` is
    what expiry is judged by, on a device a SignedTime, and `heard` is told when a bundle was made.
    """

    def __init__(
        self,
        tenant: str,
        root_hash: bytes,
        *,
        now: Callable[[], float],
        bundle: bytes = b"",
        keep: Callable[[bytes], None] | None = None,
        heard: Callable[[float], None] | None = None,
    ) -> None:
        self._heard = heard
        self._tenant = tenant
        self._root_hash = root_hash
        self._now = now
        self._keep = keep
        self._changed = threading.Condition()
        self._current: KeyBundle | None = None
        self._failure: FleetError | None = None
        self._arrived = False
        if bundle:
            try:
                self._current = self._verified(bundle)
            except (EnrolmentError, RemoteProtocolError):
                self._current = None

    def lookup(self, name: str) -> PublicIdentity | None:
        """Return the coordinator's keys, or None for any other name or while none are known."""
        current = self._current
        return current.identity if current is not None and name == COORDINATOR else None

    def announced(self, name: str) -> PublicIdentity | None:
        """Return what `lookup` does, but None until a bundle has arrived in this run.

        To seal by: the bundle brings the time, and a message is sealed for a time.
        """
        return self.lookup(name) if self._arrived else None

    def receive(self, data: bytes) -> None:
        """Take a bundle that arrived; only one that verifies and is not older counts.

        Raises:
            EnrolmentError: signed by another root, for another tenant, older or expired.
            RemoteProtocolError: not a bundle.
        """
        try:
            bundle = self._verified(data)
        except (EnrolmentError, RemoteProtocolError) as exc:
            with self._changed:
                self._failure = exc
                self._changed.notify_all()
            raise
        with self._changed:
            fresh, self._current = bundle != self._current, bundle
            self._arrived = True
            self._changed.notify_all()
        if fresh and self._keep is not None:
            self._keep(data)

    def wait(self, timeout_s: float) -> PublicIdentity:
        """Return the coordinator's keys as soon as they are known.

        Raises:
            EnrolmentError: keys arrived, but not those the enrolment code vouches for.
            LinkError: none arrived in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._current or self._failure, timeout_s)
            if self._current is not None:
                return self._current.identity
            if self._failure is not None:
                raise EnrolmentError(str(self._failure)) from self._failure
        raise LinkError(
            f"the coordinator's keys did not arrive within {timeout_s:.0f} s; "
            f"is a coordinator of tenant {self._tenant} running?"
        )

    def _verified(self, data: bytes) -> KeyBundle:
        held = self._current.version if self._current is not None else 0
        bundle = KeyBundle.verify(
            data, self._root_hash, self._now(), tenant=self._tenant, newer_than=held
        )
        if self._heard is not None:
            self._heard(bundle.issued_s)
        return bundle
