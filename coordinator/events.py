"""What happens, as one JSON object a line: {"t": seconds since 1970, "event": name, ...}.

Knows how an event is written, to a stream and to the store. Does not know what the events mean.
Values are figures, names and ids; never text, labels of examples, keys or secrets.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from coordinator.store import Store

PASSING = frozenset({"progress"})
"""Events that are shown but not kept: there are many, and the last one says it all."""


class Events:
    """Writes events to `stream` (one flushed line each) and keeps them in `store`; either or both.

    Thread-safe.
    """

    def __init__(
        self, now: Callable[[], float], *, stream: TextIO | None = None, store: Store | None = None
    ) -> None:
        self._now, self._stream, self._store = now, stream, store
        self._lock = threading.Lock()

    def __call__(self, event: str, **values: object) -> None:
        """Write one event."""
        line = json.dumps({"t": round(self._now(), 3), "event": event, **values}, default=_plain)
        if self._store is not None and event not in PASSING:
            self._store.add_event(line)
        if self._stream is not None:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()

    @contextmanager
    def stage(self, name: str, **values: object) -> Iterator[None]:
        """Write the start of a stage and, also if it raises, its end with its seconds."""
        started = time.monotonic()
        self("stage_start", stage=name, **values)
        try:
            yield
        finally:
            seconds = round(time.monotonic() - started, 3)
            self("stage_end", stage=name, seconds=seconds, **values)


def _plain(value: object) -> object:
    item = getattr(value, "item", None)  # a numpy number
    if callable(item):
        number = item()
        return None if isinstance(number, float) and not math.isfinite(number) else number
    return str(value)
