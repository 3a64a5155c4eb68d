"""Who may use the processor now: a few at once, a few waiting in order, the rest are told so.

Knows order and limits. Does not know requests or models.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_LOOK_S = 0.05
"""How often one who waits looks whether he is still wanted."""


class Full(Exception):  # noqa: N818 - a state, not a fault
    """All places are taken, those for waiting too."""


class GivenUp(Exception):  # noqa: N818 - a state, not a fault
    """The one who waited has left."""


class Turns:
    """`at_once` users at a time (at least 1) and at most `waiting` more in line."""

    def __init__(self, *, at_once: int, waiting: int) -> None:
        self._free = at_once
        self._waiting = waiting
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, cancel: threading.Event) -> Iterator[None]:
        """Hold a place for as long as the context lasts; wait for it in order of arrival.

        Raises:
            Full: no place and no room to wait.
            GivenUp: `cancel` was set meanwhile.
        """
        ticket = object()
        with self._changed:
            if len(self._line) >= self._waiting + self._free:
                raise Full
            self._line.append(ticket)
            try:
                while not cancel.is_set() and not (self._free and self._line[0] is ticket):
                    self._changed.wait(_LOOK_S)
                if cancel.is_set():
                    raise GivenUp
                self._free -= 1
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
