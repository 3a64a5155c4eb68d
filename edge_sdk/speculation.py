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
That takes a bundle exported with blocks of 32: with larger ones two rows, too, get another kernel
than a third beside them.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
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
from edge_sdk.verify_model import VERIFY_FILE, VerifyModel

logger = logging.getLogger(__name__)

LONGEST_DRAFT = 6
"""Tokens guessed at most; on a CPU each one read costs nearly half a pass."""
JUDGE_TOKENS = 256
"""After so many tokens a speculator that was slower than plain decoding switches itself off."""
_ROUNDS, _IN_A_ROW = 5, 4  # passes timed; the quickest round counts, since others work here too
_CALIBRATION_TOKENS = 48


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

    def note(self, guess: Guess, step: Step, passed_s: float) -> None:
        self.tokens += len(step.tokens)
        self.passes += 1
        self.accepted += step.accepted
        self.looked_at += step.looked_at
        self.expected += guess.expected
        self.price += guess.price
        self.passed_s += passed_s

    def report(self, plain_s: float, off: str) -> Report:
        if not self.passes:
            return Report(off=off)
        return Report(
            tokens=self.tokens,
            passes=self.passes,
            alpha=self.accepted / max(1, self.looked_at),
            predicted=self.expected / self.price,
            measured=self.tokens * plain_s / max(self.passed_s, 1e-9),
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
        threads: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Guess from the text itself with `lookup`, and with `draft`, a session whose tokenizer is
        the target's. `longest` is the most tokens guessed at once.

        A bundle made speculative (exporters/draft.py) has a graph for it, which is loaded beside
        the session's with `threads` threads; without, the session changes to its slowest graph.

        Raises:
            RuntimeFailure: another tokenizer.
        """
        if draft is not None:
            _check_pair(target, draft)
        self._target, self._draft = target, draft
        self._verify: VerifyModel | None = None
        if (target.folder / VERIFY_FILE).is_file():
            options = {"intra_op_num_threads": threads} if threads else {}
            self._verify = VerifyModel(target.folder, session_options=options)
        self._guesses = Guesses(lookup=lookup)
        self._longest, self._steady, self._clock = longest, steady, clock
        self._ends = BundleFiles.read(target.folder).ends
        self._sums, self._lately = _Sums(), _Sums()
        self._model: DraftModel | None = None
        self._usual_s = 0.0  # of a token of plain decoding, disturbed as everything here is
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
            self.costs = self._measured()
        except RuntimeFailure as exc:  # such as a graph that gives the last token's logits only
            self.costs = Costs(1.0, [1.0] * (self._longest + 1))
            self._switch_off(str(exc))
        if not self.off and best_length(1.0, cost=0.0, verify_cost=self.costs.verify)[0] == 0:
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
        for sums in (self._sums, self._lately):
            sums.note(guess, step, passed_s)

    # --- inside -------------------------------------------------------------------------------

    def _plain(self, prompt: str, request: Request) -> bool:
        if not self.off and self.costs is None:
            self.calibrate()
        if self.off or request.schema or request.repetition_penalty != 1.0 or not prompt.strip():
            return True
        return not 0 < self._target.count(prompt) < self._target.context  # the session says why

    def _rows(self, session: SlmSession, limit: int, request: Request | None = None) -> Rows:
        request, limit = request or session.request({}), min(limit, session.context)
        every_row = session is self._target  # of the draft model only the last one's logits
        if every_row and self._verify is not None and not request.adapter:
            return GenaiRows(self._verify.generator(request, limit=limit, every_row=True))
        generator = session.generator(request, limit=limit, every_row=every_row)
        return GenaiRows(generator, every_row=every_row)

    def _measured(self) -> Costs:
        lengths = range(1, self._longest + 2)
        passes: list[list[float]] = [[] for _ in lengths]
        plain: list[float] = []
        drafts = [0.0] if self._draft is None else []
        start = min(_CALIBRATION_TOKENS, self._target.context // 2)
        rows = self._rows(self._target, start + self._longest + 1)
        rows.read([0] * start)
        small = self._rows(self._draft, start + 1) if self._draft is not None else None
        if small is not None:
            small.read([0] * start)
        for _ in range(_ROUNDS):  # so that a busy moment hits all alike
            plain.append(self._usual())
            for times, length in zip(passes, lengths, strict=True):
                times.append(self._timed(rows, length, start))
            if small is not None:
                drafts.append(self._timed(small, 1, start))
        self._usual_s = mean(plain)
        return Costs(min(plain), [min(times) for times in passes], min(drafts))

    def _usual(self) -> float:
        """Seconds of this clock for a token when nobody speculates."""
        wall, begun = time.perf_counter(), self._clock()
        rate = self._target.measure_speed()
        return (self._clock() - begun) / (time.perf_counter() - wall) / rate

    def _timed(self, rows: Rows, length: int, start: int) -> float:
        """Seconds of a pass; the first of some, to which the caches are strange, left out."""
        begun = 0.0
        for i in range(1 + _IN_A_ROW):
            if i == 1:
                begun = self._clock()
            rows.read([0] * length)
            rows.rewind(start)
        return (self._clock() - begun) / _IN_A_ROW

    def _judge(self, _: Answer) -> None:
        lately = self._lately
        if self.off or lately.tokens < JUDGE_TOKENS:
            return
        self._lately = _Sums()
        if self._report(lately).measured < 1.0:
            self._usual_s = self._usual()  # the machine may be busier than it was
        factor = self._report(lately).measured
        if factor < 1.0:
            self._switch_off(f"it was {factor:.2f} times as fast as plain decoding")

    def _report(self, sums: _Sums) -> Report:
        return sums.report(self._usual_s, self.off)

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
