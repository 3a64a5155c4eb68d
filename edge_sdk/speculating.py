"""Stands where a generator of onnxruntime-genai would: tokens one by one, passes as needed.

Knows rows of logits, the accept rule and whom to ask for guesses. Does not know where guesses come
from, what they cost, or text.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_sdk.algorithms.rows import Rows
from edge_sdk.algorithms.speculative import (
    Draft,
    Sampling,
    Step,
    accept,
    accept_likeliest,
    ended,
)
from edge_sdk.guessing import Guess
from edge_sdk.prompts import Tokens


class Adviser(Protocol):
    """Says what to guess, and is told what came of it."""

    def add(self, tokens: Tokens) -> None:
        """Told of every token of the text, in order."""

    def guess(self, text: Tokens, room: int) -> Guess:
        """Return at most `room` tokens that may follow `text`."""

    def note(self, guess: Guess, step: Step, passed_s: float) -> None:
        """Told what a pass gave and how many seconds it took, guessing included."""


class Speculating:
    """One answer; has those methods of genai's generator that `Answer` calls."""

    def __init__(
        self,
        rows: Rows,
        adviser: Adviser,
        sampling: Sampling,
        *,
        rng: np.random.Generator,
        ends: frozenset[int],
        limit: int,
        steady: bool,
        clock: Callable[[], float],
    ) -> None:
        """`limit` counts prompt and answer. With `steady` every pass reads at least two tokens."""
        self._rows, self._adviser, self._sampling, self._rng = rows, adviser, sampling, rng
        self._ends, self._limit, self._steady, self._clock = ends, limit, steady, clock
        self._text: Tokens = []
        self._queue: Tokens = []
        self._after_prompt: npt.NDArray[np.float32] | None = None  # (1, vocab)
        self._shown = -1

    def append_tokens(self, ids: npt.NDArray[np.int32]) -> None:
        """Read a part of the prompt, (1, T)."""
        tokens = [int(token) for token in ids[0]]
        self._after_prompt = self._rows.read(tokens)[-1:]
        self._take(tokens)

    def generate_next_token(self) -> None:
        """Make the next token known, with a pass if none is waiting."""
        if not self._queue:
            self._queue = self._pass()
            self._take(self._queue)
        self._shown = self._queue.pop(0)

    def get_next_tokens(self) -> list[int]:
        """Return the token made known last."""
        return [self._shown]

    def is_done(self) -> bool:
        """Whether an end token was shown or the room is used up."""
        full = len(self._text) >= self._limit and not self._queue
        return full or self._shown in self._ends

    def _take(self, tokens: Tokens) -> None:
        self._text += tokens
        self._adviser.add(tokens)

    def _pass(self) -> Tokens:
        if self._after_prompt is not None:
            logits, self._after_prompt = self._after_prompt, None
            return self._settle([], logits).tokens
        begun = self._clock()
        room = self._limit - len(self._text) - 1
        guess = self._adviser.guess(self._text, room)
        unread = self._text[self._rows.length :]
        filler = unread[-1:] if self._steady and not guess.tokens and room > 0 else []
        logits = self._rows.read([*unread, *guess.tokens, *filler])[len(unread) - 1 :]
        step = self._settle(guess.tokens, logits[: len(guess.tokens) + 1])
        self._rows.rewind(len(self._text) + step.accepted)
        self._adviser.note(guess, step, self._clock() - begun)
        return step.tokens

    def _settle(self, tokens: Tokens, logits: npt.NDArray[np.float32]) -> Step:
        if self._sampling.temperature == 0:
            step = accept_likeliest(tokens, logits.argmax(axis=1))
        else:
            step = accept(Draft(tokens), self._sampling.probabilities(logits), self._rng)
        return ended(step, self._ends)
