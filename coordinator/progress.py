"""Bytes on their way as events, not more often than a terminal shows them.

Knows transfers' progress and a clock. Does not know what is transferred or who waits for it.
"""

from collections.abc import Callable

from coordinator.events import Events
from edge_sdk.link.sending import Progress

PROGRESS_EVENTS_S = 0.25
"""At most one progress event per stream in this time."""


class ProgressEvents:
    """Writes one event for a transfer now and then, and one for its end."""

    def __init__(self, events: Events, clock: Callable[[], float]) -> None:
        self._events, self._clock = events, clock
        self._shown: dict[bytes, float] = {}

    def __call__(self, progress: Progress) -> None:
        """Take note of how far one message is."""
        now = self._clock()
        whole = progress.done_bytes >= progress.total_bytes
        if not whole and now - self._shown.get(progress.stream, 0.0) < PROGRESS_EVENTS_S:
            return
        self._shown[progress.stream] = now
        if whole:
            self._shown.pop(progress.stream, None)
        self._events(
            "progress",
            device=progress.peer,
            kind=progress.kind,
            outgoing=progress.outgoing,
            fraction=round(progress.done_bytes / max(1, progress.total_bytes), 4),
            total_bytes=progress.total_bytes,
        )
