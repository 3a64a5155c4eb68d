"""Which tokens are worth guessing before a pass: from the text itself, or from a smaller model.

Knows costs, a record of what came of earlier guesses, and the paper's formula. Does not know
sessions, answers or clocks.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edge_sdk.algorithms.lookup import LONGEST, Lookup
from edge_sdk.algorithms.rows import Rows
from edge_sdk.algorithms.speculative import Step, best_length, expected_tokens
from edge_sdk.prompts import Tokens

MODEL = 0
"""Name of the draft model's record; those of the lookup are the lengths of the match."""
TRIALS = 12
"""Drafts of the draft model tried before its own record is believed."""
_HOPED = 0.8  # of the draft model, while it is tried
_PRIOR = 4.0  # drafted tokens that the first opinion about a guesser counts for
_FADE = 0.98  # per draft: what was accepted lately says more


@dataclass(frozen=True, slots=True)
class Costs:
    """This machine's seconds, undisturbed: of a token of plain decoding, of passes over 1, 2, ..
    tokens, of a token of the draft model."""

    plain_s: float
    passes_s: list[float]
    draft_s: float = 0.0

    @property
    def verify(self) -> tuple[float, ...]:
        """v(g) for g from 0 on, in tokens of plain decoding."""
        return tuple(seconds / self.plain_s for seconds in self.passes_s)

    @property
    def draft(self) -> float:
        """c, in tokens of plain decoding."""
        return self.draft_s / self.plain_s


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens worth guessing, whose guess it is, and what a pass over them should bring.

    `expected` tokens in `price` times of reading one.
    """

    tokens: Tokens = field(default_factory=list)
    by: int = MODEL
    expected: float = 1.0
    price: float = 1.0


@dataclass(slots=True)
class Record:
    """What became of one guesser's tokens; begins with an opinion."""

    opinion: float
    accepted: float = 0.0
    looked_at: float = 0.0
    drafts: int = 0

    @property
    def alpha(self) -> float:
        return (self.accepted + _PRIOR * self.opinion) / (self.looked_at + _PRIOR)

    def note(self, step: Step) -> None:
        """Keep what came of one draft."""
        self.accepted = _FADE * self.accepted + step.accepted
        self.looked_at = _FADE * self.looked_at + step.looked_at
        self.drafts += 1


class DraftModel:
    """Greedy guesses of a small model that follows the text as it grows."""

    def __init__(self, rows: Rows, ends: frozenset[int]) -> None:
        self._rows, self._ends = rows, ends
        self._read: Tokens = []
        self._sure = 0  # so many first tokens of what was read are the text's

    def guess(self, text: Tokens, length: int) -> Tokens:
        """Return up to `length` tokens after `text`; ends before an end token."""
        guessed: Tokens = []
        while len(guessed) < length:
            best = int(self.logits([*text, *guessed]).argmax())
            if best in self._ends:
                break
            guessed.append(best)
        self._sure = min(self._sure, len(text))  # what was guessed may not come
        return guessed

    def logits(self, text: Tokens) -> npt.NDArray[np.float32]:
        """Return what the model expects after `text`, (vocab,)."""
        most = min(len(self._read), len(text) - 1)  # the last token is read for its logits
        sure = min(self._sure, most)
        while sure < most and self._read[sure] == text[sure]:
            sure += 1
        self._rows.rewind(sure)
        self._read[sure:] = text[sure:]
        self._sure = sure
        after: npt.NDArray[np.float32] = self._rows.read(text[sure:])[-1]
        return after


class Guesses:
    """Both ways of guessing, and their records over all answers."""

    def __init__(self, *, lookup: bool = True) -> None:
        self._lookup = Lookup() if lookup else None
        opinions = {MODEL: 0.6, **{n: 0.3 + 0.15 * n for n in range(1, LONGEST + 1)}}
        self._records = {by: Record(opinion) for by, opinion in opinions.items()}

    def begin(self) -> None:
        """Begin another text."""
        if self._lookup is not None:
            self._lookup.begin()

    def add(self, tokens: Tokens) -> None:
        """Take in the next tokens of the text."""
        if self._lookup is not None:
            self._lookup.add(tokens)

    def best(self, text: Tokens, room: int, costs: Costs, model: DraftModel | None) -> Guess:
        """Return the guess after `text` that pays most; an empty one where none pays.

        At most `room` tokens are guessed.
        """
        verify = costs.verify[: max(1, room + 1)]
        rest = [v / verify[0] for v in verify]  # against a pass over one token, the other choice
        found = Guess(price=verify[0])
        tokens, n = self._lookup.guess(len(verify) - 1) if self._lookup else ([], 0)
        gained = 1.0
        if tokens:
            alpha = self._records[n].alpha
            length, gained = best_length(alpha, cost=0.0, verify_cost=rest)
            found = Guess(tokens[:length], n, expected_tokens(alpha, length), verify[length])
        if model is not None:
            alpha = self._hope()
            cost = costs.draft / verify[0]
            length, gain = best_length(alpha, cost=cost, verify_cost=rest)
            if gain > gained:
                price = length * costs.draft + verify[length]
                guessed = model.guess(text, length)
                return Guess(guessed, MODEL, expected_tokens(alpha, length), price)
        return found

    def note(self, guess: Guess, step: Step) -> None:
        """Keep what came of a guess."""
        if guess.tokens:
            self._records[guess.by].note(step)

    def _hope(self) -> float:
        record = self._records[MODEL]
        return max(record.alpha, _HOPED) if record.drafts < TRIALS else record.alpha
