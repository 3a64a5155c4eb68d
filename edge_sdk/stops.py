"""Stop strings: what may be shown of a text that is still being written.

Knows pieces of text. Does not know tokens or models.
"""

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, of which nothing is ever shown.

    A piece that may be the beginning of a stop string is held back until more text decides.

    Attributes:
        found: the stop string that ended the text, "" so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = ""

    def feed(self, piece: str) -> str:
        """Take the next piece; return what may be shown now."""
        if not self._stops:
            return piece
        if self.found:
            return ""
        text = self._held + piece
        places = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if places:
            # The earliest in the text; of two that begin there, the longer.
            at, self.found = min(places, key=lambda place: (place[0], -len(place[1])))
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """Return what was held back, because no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
