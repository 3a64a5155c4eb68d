"""Guessing from what was written before: the last few tokens are looked up in the text so far.

Knows token ids. Does not know models, acceptance or cost. The idea is prompt lookup decoding
(Saxena 2023), which onnxruntime-genai calls n-gram decoding; here the longest match decides, and
what was written in earlier answers is remembered as well, up to a limit.
"""

from collections.abc import Iterable, Sequence

LONGEST = 4
"""Tokens of the longest suffix that is looked up; more would seldom match."""
MEMORY_TOKENS = 16_384
"""Tokens remembered over answers; some hundred bytes each."""


class Lookup:
    """A text that grows, and where each short run of tokens was last followed by something."""

    def __init__(self, *, longest: int = LONGEST, memory: int = MEMORY_TOKENS) -> None:
        self._longest, self._memory = longest, memory
        self._history: list[int] = []
        self._begins = 0
        self._after: dict[tuple[int, ...], int] = {}

    def begin(self) -> None:
        """Begin another text; no run of tokens goes over from the one before."""
        if len(self._history) > self._memory:
            kept = self._history[-self._memory // 2 :]
            self._history, self._after, self._begins = [], {}, 0
            self.add(kept)
        self._begins = len(self._history)

    def add(self, tokens: Iterable[int]) -> None:
        """Take in the next tokens of the text."""
        history = self._history
        for token in tokens:
            place = len(history)
            for n in range(1, min(self._longest, place - self._begins) + 1):
                self._after[tuple(history[place - n :])] = place
            history.append(token)

    def guess(self, length: int) -> tuple[list[int], int]:
        """Return up to `length` tokens that may follow, and how long the matching suffix was.

        A continuation that reaches the end of the text goes round: it repeats.
        """
        history = self._history
        if length < 1:
            return [], 0
        for n in range(min(self._longest, len(history) - self._begins), 0, -1):
            place = self._after.get(tuple(history[len(history) - n :]))
            if place is not None:
                return _around(history[place : place + length], length), n
        return [], 0


def _around(tokens: Sequence[int], length: int) -> list[int]:
    return (list(tokens) * -(-length // len(tokens)))[:length]
