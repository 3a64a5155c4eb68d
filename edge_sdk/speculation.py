"""Speculative decoding on one device: a session's own answers, sooner where guesses come true.

Knows a session, perhaps a smaller one with the same tokenizer, and a clock. Does not know the
accept rule (algorithms/speculative.py), where guesses come from (guessing.py), or any network.

Before each pass the paper's formula, with this machine's own costs, says which guess and how many
tokens of it pay; where none does, the pass reads one token as usual. `calibrate` measures the
costs: on a CPU, reading g + 1 tokens at once costs far more than one. `report` puts the prediction
beside what happened, and who was slower than plain decoding is switched off.

Exactness. Tokens are the target's own whatever is guessed, but for rounding: ONNX Runtime
multiplies one row by another kernel than several (attention differs by 5e-7), and graphs with 8-bit
activations make up to a tenth of a logit of it. Where two tokens lie within that of each other,
reading several at once may take the other one. With `steady` no pass reads fewer than two tokens;
answers are then the same bit for bit whatever is guessed, and passes without a guess are slower.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from edge_sdk.algorithms.rows import GenaiRows, Rows
from edge_sdk.algorithms.speculative import Sampling, Step, best_length
from edge_sdk.answer import Answer
from edge_sdk.bundle_files import BundleFiles
from edge_sdk.errors import RuntimeFailure
from edge_sdk.generation import Options, Request
from edge_sdk.guessing import Costs, DraftModel, Guess, Guesses
from edge_sdk.prompts import Tokens
from edge_sdk.runtime import SlmSession
from edge_sdk.speculating import Speculating

logger = logging.getLogger(__name__)

LONGEST_DRAFT = 6
"""Tokens guessed at most; on a CPU each one read costs nearly half a pass."""
JUDGE_TOKENS = 256
"""After so many tokens a speculator that was slower than plain decoding switches itself off."""
_TIMES = 8  # passes timed per length; the quickest counts, since others use the machine too
_CALIBRATION_TOKENS = 48
_SURE = 8.0  # plain passes that the calibrated time of one counts for


@dataclass(frozen=True, slots=True)
class Report:
    """What speculation did so far, over all answers.

    `predicted` (the formula with v(g)) and `measured` are factors over plain decoding, 0.0 before
    there is anything to say. `alpha`: share of the drafted tokens looked at that were accepted.
    `off`: why it switched itself off, "" while it is on.
    """

    tokens: int = 0
    passes: int = 0
    alpha: float = 0.0
    predicted: float = 0.0
    measured: float = 0.0
    off: str = ""

    def __str__(self) -> str:
        state = f"off ({self.off})" if self.off else "on"
        return (
            f"speculation {state}: predicted {self.predicted:.2f}, measured {self.measured:.2f} "
            f"times plain decoding; {self.tokens} tokens in {self.passes} passes, "
            f"alpha {self.alpha:.2f}"
        )


@dataclass(slots=True)
class _Sums:
    tokens: int = 0
    passes: int = 0
    accepted: int = 0
    looked_at: int = 0
    expected: float = 0.0
    price: float = 0.0
    passed_s: float = 0.0
    plain_passes: int = 0
    plain_s: float = 0.0

    def note(self, guess: Guess, step: Step, passed_s: float, *, plain: bool) -> None:
        self.tokens += len(step.tokens)
        self.passes += 1
        self.accepted += step.accepted
        self.looked_at += step.looked_at
        self.expected += guess.expected
        self.price += guess.price
        self.passed_s += passed_s
        if plain:
            self.plain_passes += 1
            self.plain_s += passed_s

    def report(self, one_s: float, off: str) -> Report:
        if not self.passes:
            return Report(off=off)
        one_s = (_SURE * one_s + self.plain_s) / (_SURE + self.plain_passes)
        return Report(
            tokens=self.tokens,
            passes=self.passes,
            alpha=self.accepted / max(1, self.looked_at),
            predicted=self.expected / self.price,
            measured=self.tokens * one_s / max(self.passed_s, 1e-9),
            off=off,
        )


class Speculator:
    """Answers of `target`, speculatively. One answer at a time.

    Attributes:
        off: why it is off, "" while it is on; may be set.
        costs: what `calibrate` measured, None before.
    """

    def __init__(
        self,
        target: SlmSession,
        draft: SlmSession | None = None,
        *,
        longest: int = LONGEST_DRAFT,
        lookup: bool = True,
        steady: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Guess from the text itself with `lookup`, and with `draft`, a session whose tokenizer is
        the target's. `longest` is the most tokens guessed at once.

        Raises:
            RuntimeFailure: another tokenizer.
        """
        if draft is not None:
            _check_pair(target, draft)
        self._target, self._draft = target, draft
        self._guesses = Guesses(lookup=lookup)
        self._longest, self._steady, self._clock = longest, steady, clock
        self._ends = BundleFiles.read(target.folder).ends
        self._sums, self._lately = _Sums(), _Sums()
        self._model: DraftModel | None = None
        self.costs: Costs | None = None
        self.off = ""

    def generate(self, prompt: str, **options: Unpack[Options]) -> str:
        """Return what `target.generate` returns.

        Raises:
            RuntimeFailure: as the session.
        """
        if self._plain(prompt, self._target.request(options)):
            return self._target.generate(prompt, **options)
        answer = self.stream(prompt, **options)
        for _ in answer:
            pass
        return answer.text

    def stream(self, prompt: str, **options: Unpack[Options]) -> Answer:
        """Return what `target.stream` returns. What is never faster (JSON schemas, penalties, a
        speculator that is off) goes straight there.

        Raises:
            RuntimeFailure: as the session.
        """
        request = self._target.request(options)
        if self._plain(prompt, request):
            return self._target.stream(prompt, **options)
        ids = self._target.encode(prompt)
        limit = min(self._target.context, len(ids) + request.max_tokens)
        self._guesses.begin()
        if self._draft is not None:
            self._model = DraftModel(self._rows(self._draft, limit), self._ends)
        writing = Speculating(
            self._rows(self._target, limit, request),
            self,
            Sampling(request.temperature, request.top_k, request.top_p),
            rng=np.random.default_rng(request.seed),
            ends=self._ends,
            limit=limit,
            steady=self._steady,
            clock=self._clock,
        )
        return self._target.answer(
            writing, request, unread=ids, prompt_tokens=len(ids), ended=self._judge
        )

    def report(self) -> Report:
        """Return what was predicted and what was measured."""
        return self._report(self._sums)

    def calibrate(self) -> Costs:
        """Time both models and return this machine's costs; a tenth of a second for 12 M weights.

        Switches off where the model does not give the logits of every token it reads, and where
        even guesses that cost nothing and always come true would lose.
        """
        try:
            times = self._times(self._target, range(1, self._longest + 2))
            draft_s = self._times(self._draft, [1])[0] if self._draft is not None else 0.0
        except RuntimeFailure as exc:  # such as a graph that gives the last token's logits only
            times, draft_s = [1.0] * (self._longest + 1), 0.0
            self._switch_off(str(exc))
        verify = tuple(max(times[: g + 1]) / times[0] for g in range(len(times)))
        self.costs = Costs(times[0], verify, draft_s / times[0])
        if not self.off and best_length(1.0, cost=0.0, verify_cost=verify)[0] == 0:
            self._switch_off("reading several tokens at once costs as much as one by one here")
        return self.costs

    # --- the adviser of one answer (see Speculating) ------------------------------------------

    def add(self, tokens: Tokens) -> None:
        """Take in tokens of the text."""
        self._guesses.add(tokens)

    def guess(self, text: Tokens, room: int) -> Guess:
        """Return the guess that pays most now."""
        assert self.costs is not None, "calibrated before the first answer"
        return self._guesses.best(text, room, self.costs, self._model)

    def note(self, guess: Guess, step: Step, passed_s: float) -> None:
        """Keep what a pass gave and took."""
        self._guesses.note(guess, step)
        plain = not guess.tokens and not self._steady
        for sums in (self._sums, self._lately):
            sums.note(guess, step, passed_s, plain=plain)

    # --- inside -------------------------------------------------------------------------------

    def _plain(self, prompt: str, request: Request) -> bool:
        if not self.off and self.costs is None:
            self.calibrate()
        if self.off or request.schema or request.repetition_penalty != 1.0 or not prompt.strip():
            return True
        return not 0 < self._target.count(prompt) < self._target.context  # the session says why

    def _rows(self, session: SlmSession, limit: int, request: Request | None = None) -> Rows:
        every_row = session is self._target  # of the draft model only the last one's logits
        generator = session.generator(
            request or session.request({}), limit=min(limit, session.context), every_row=every_row
        )
        return GenaiRows(generator, every_row=every_row)

    def _times(self, session: SlmSession, counts: Sequence[int]) -> list[float]:
        start = min(_CALIBRATION_TOKENS, session.context // 2)
        rows = self._rows(session, start + max(counts))
        rows.read([0] * start)
        found: list[list[float]] = [[] for _ in counts]
        for _ in range(_TIMES + 1):
            for times, count in zip(found, counts, strict=True):
                begun = self._clock()
                rows.read([0] * count)
                rows.rewind(start)
                times.append(self._clock() - begun)
        return [min(times[1:]) for times in found]  # the first one warms up

    def _judge(self, _: Answer) -> None:
        lately = self._report(self._lately)
        if self.off or lately.tokens < JUDGE_TOKENS:
            return
        self._lately = _Sums()
        if lately.measured < 1.0:
            self._switch_off(f"it was {lately.measured:.2f} times as fast as plain decoding")

    def _report(self, sums: _Sums) -> Report:
        return sums.report(self.costs.one_s if self.costs else 0.0, self.off)

    def _switch_off(self, why: str) -> None:
        self.off = why
        logger.info("speculative decoding is off: %s", why)


def _check_pair(target: SlmSession, draft: SlmSession) -> None:
    if _tokenizer(draft) != _tokenizer(target):
        raise RuntimeFailure(
            f"{draft.folder} has another tokenizer than {target.folder}; a draft model needs the "
            "very same tokenizer.json"
        )
    if draft.context < target.context:
        raise RuntimeFailure(
            f"the draft model's context is {draft.context} tokens and the target's "
            f"{target.context}; open the target with context={draft.context}"
        )


def _tokenizer(session: SlmSession) -> bytes:
    try:
        return (session.folder / "tokenizer.json").read_bytes()
    except OSError as exc:
        raise RuntimeFailure(f"{session.folder} has no tokenizer.json: {exc}") from exc
