"""Edge drafts, cloud verifies: this device's small model guesses, the coordinator's large one
says what is taken.

Knows the device's session, a way to ask, and clocks. Does not know envelopes, topics or the target.

The text leaves this device as token ids, sealed for the coordinator: that is why it is off unless
both sides switch it on. The draft is greedy, so ids are all the verifier needs, and what comes is
the target's own (greedy, or sampled with its distribution). Each pass costs a round trip; it stands
in the denominator of the prediction, T_p E(g) / (g T_q + T_p v(g) + round trip), against a target
that writes alone at T_p per token. Where that is below 1, or the coordinator does not answer, or
refuses, the device goes on alone with its own model and says so.
"""

import hashlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import numpy.typing as npt

from edge_sdk.algorithms.rows import GenaiRows, Rows
from edge_sdk.algorithms.speculative import Sampling, best_length, expected_tokens
from edge_sdk.answer import Answer
from edge_sdk.bundle_files import BundleFiles
from edge_sdk.errors import LinkError, RuntimeFailure
from edge_sdk.generation import Options, Request
from edge_sdk.guessing import DraftModel
from edge_sdk.prompts import Tokens
from edge_sdk.runtime import SlmSession
from edge_sdk.wire.messages import AnyMessage, Refused, Verified, VerifyDraft

logger = logging.getLogger(__name__)

LONGEST_DRAFT = 8
"""Tokens guessed at most: a round trip is dear, so drafts are longer than on one machine."""
TIMEOUT_S = 5.0
"""How long an answer is waited for before the device goes on alone."""
_TRIED = 4  # passes before the prediction is believed
_HOPED, _PRIOR = 0.7, 4.0
_NEW = 0.3  # weight of the newest pass in what passes and round trips are believed to take

Ask = Callable[[VerifyDraft, float], AnyMessage]
"""(question, seconds to wait) -> its answer; raises LinkError."""


@dataclass(slots=True)
class CloudReport:
    """What passes gave and took so far. `alone`: why the device went on alone, "" if it did not.

    Times are seconds: `one_s` the target's for one token, `pass_s` for a draft, `draft_s` ours for
    a guessed token, `trip_s` the round trip without the pass.
    """

    tokens: int = 0
    passes: int = 0
    accepted: float = 0.0
    looked_at: float = 0.0
    one_s: float = 0.0
    pass_s: float = 0.0
    draft_s: float = 0.0
    trip_s: float = 0.0
    spent_s: float = 0.0
    alone: str = ""

    @property
    def alpha(self) -> float:
        return (self.accepted + _PRIOR * _HOPED) / (self.looked_at + _PRIOR)

    @property
    def measured(self) -> float:
        """Factor over a target that writes alone, 0.0 before there is one."""
        return self.tokens * self.one_s / self.spent_s if self.spent_s else 0.0

    def best(self, longest: int) -> tuple[int, float]:
        """Return the length of the next draft and the predicted factor; (0, 1.0) if it loses."""
        if not self.one_s:
            return longest // 2, 1.0
        verify = (self.pass_s + self.trip_s) / self.one_s
        costs = [verify] * (longest + 1)
        return best_length(self.alpha, cost=self.draft_s / self.one_s, verify_cost=costs)

    def predicted(self, length: int) -> float:
        """Return the predicted factor of drafts of `length` tokens, 0.0 before there is one."""
        spent = length * self.draft_s + self.pass_s + self.trip_s
        return expected_tokens(self.alpha, length) * self.one_s / spent if self.one_s else 0.0


class CloudDrafts:
    """Answers of the coordinator's model, drafted here by `session`. One answer at a time.

    Attributes:
        report: what happened so far.
    """

    def __init__(
        self,
        session: SlmSession,
        ask: Ask,
        *,
        even_if_slower: bool = False,
        timeout_s: float = TIMEOUT_S,
        on_alone: Callable[[str], None] = lambda why: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`even_if_slower` keeps asking where the target alone would be faster, for its better
        answers. `on_alone` is told why, when the device goes on alone.
        """
        self._session, self._ask, self._clock = session, ask, clock
        self._insist, self._timeout_s, self._on_alone = even_if_slower, timeout_s, on_alone
        files = BundleFiles.read(session.folder)
        self._ends, self._vocabulary = files.ends, int(files.settings["model"]["vocab_size"])
        self._tokenizer = hashlib.sha256((session.folder / "tokenizer.json").read_bytes()).digest()
        self.report = CloudReport()

    def generate(self, prompt: str, **options: Unpack[Options]) -> str:
        """Return what the coordinator's model writes after `prompt`, or this device's alone.

        Raises:
            RuntimeFailure: as the session's.
        """
        answer = self.stream(prompt, **options)
        for _ in answer:
            pass
        return answer.text

    def stream(self, prompt: str, **options: Unpack[Options]) -> Answer:
        """Return `generate`'s answer piece by piece.

        Raises:
            RuntimeFailure: as the session's, or a schema or penalty, which only it can do.
        """
        session = self._session
        request = session.request(options)
        if request.schema or request.repetition_penalty != 1.0:
            raise RuntimeFailure("a schema or a penalty needs the device's own session")
        ids = session.encode(prompt) if prompt.strip() else []
        if not 0 < len(ids) < session.context:
            return session.stream(prompt, **options)  # which says what is wrong
        self.report.alone = ""  # a connection may be back
        limit = min(session.context, len(ids) + request.max_tokens)
        writing = _Writing(self, request, limit)
        return session.answer(writing, request, unread=ids, prompt_tokens=len(ids))

    # --- called while an answer is written ----------------------------------------------------

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        return self._ends

    def rows(self, request: Request, limit: int) -> Rows:
        """Return a text in this device's own model."""
        return GenaiRows(self._session.generator(request, limit=limit), every_row=False)

    def length(self, room: int) -> int:
        """Return how many tokens to guess now; 0 and `report.alone` set where it would lose."""
        report = self.report
        if room < 1:
            return 0
        length, _ = report.best(min(LONGEST_DRAFT, room))
        if length == 0 and (self._insist or report.passes < _TRIED):
            return min(2, room)
        if length == 0:
            best = max(report.predicted(g) for g in range(1, LONGEST_DRAFT + 1))
            self.go_alone(
                f"with a round trip of {1000 * report.trip_s:.1f} ms it would be {best:.2f} times "
                "as fast as the coordinator's model alone"
            )
        return length

    def verified(self, asked: VerifyDraft, drafting_s: float) -> Verified | None:
        """Ask; return the answer, or None once the device is to go on alone."""
        begun = self._clock()
        try:
            answer = self._ask(asked, self._timeout_s)
        except LinkError as exc:
            self.go_alone(str(exc))
            return None
        waited_s = self._clock() - begun
        if isinstance(answer, Refused):
            self.go_alone(answer.reason)
        elif not isinstance(answer, Verified) or not self._fits(answer, asked):
            self.go_alone("the coordinator answered something else")
        else:
            self._note(asked, answer, drafting_s, waited_s)
            return answer
        return None

    def go_alone(self, why: str) -> None:
        """Note, log and tell that the device goes on alone."""
        self.report.alone = why
        logger.warning("cloud drafts: on alone: %s", why)
        self._on_alone(why)

    def _fits(self, answer: Verified, asked: VerifyDraft) -> bool:
        n = answer.accepted
        good = answer.tokens[:n] == asked.draft[:n] and n <= len(asked.draft)
        good = good and max(answer.tokens, default=0) < self._vocabulary
        return not answer.tokens or (good and n <= len(answer.tokens) <= len(asked.draft) + 1)

    def _note(
        self, asked: VerifyDraft, answer: Verified, drafting_s: float, waited_s: float
    ) -> None:
        report, g = self.report, len(asked.draft)
        new = _NEW if report.passes else 1.0
        pass_s = min(answer.pass_s, waited_s)
        report.one_s = answer.one_s
        if asked.at:  # the first pass reads the prompt
            report.pass_s += new * (pass_s - report.pass_s)
        report.trip_s += new * (waited_s - pass_s - report.trip_s)
        report.draft_s += new * (drafting_s / max(1, g) - report.draft_s)
        report.passes += 1
        report.tokens += len(answer.tokens)
        report.accepted += answer.accepted
        report.looked_at += min(g, answer.accepted + 1)
        report.spent_s += drafting_s + waited_s

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, from any start."""
        return self._clock

    @property
    def tokenizer(self) -> bytes:
        """SHA-256 of tokenizer.json."""
        return self._tokenizer


class _Writing:
    """One answer; has those methods of genai's generator that `Answer` calls."""

    def __init__(self, owner: CloudDrafts, request: Request, limit: int) -> None:
        self._owner, self._limit = owner, limit
        self._sampling = Sampling(request.temperature, request.top_k, request.top_p)
        self._rng = np.random.default_rng(request.seed)
        self._rows = owner.rows(request, limit)
        self._draft = DraftModel(self._rows, owner.ends)
        self._task = f"draft-{secrets.token_hex(8)}"
        self._text: Tokens = []
        self._held = 0  # tokens that the coordinator has
        self._queue: Tokens = []
        self._shown = -1

    def append_tokens(self, ids: npt.NDArray[np.int32]) -> None:
        """Take a part of the prompt, (1, T); it is read with the first guess."""
        self._text += [int(token) for token in ids[0]]

    def generate_next_token(self) -> None:
        """Make the next token known, with a pass if none is waiting."""
        if not self._queue:
            self._queue = self._next()
            self._text += self._queue
        self._shown = self._queue.pop(0)

    def get_next_tokens(self) -> list[int]:
        """Return the token made known last."""
        return [self._shown]

    def is_done(self) -> bool:
        """Whether an end token was shown or the room is used up."""
        full = len(self._text) >= self._limit and not self._queue
        return full or self._shown in self._owner.ends

    def _next(self) -> Tokens:
        owner, room = self._owner, self._limit - len(self._text) - 1
        length = 0 if owner.report.alone else owner.length(room)
        if owner.report.alone:
            return [self._own()]
        begun = owner.clock()
        guessed = self._draft.guess(self._text, length) if length else []
        drafting_s = owner.clock() - begun
        for _ in range(2):
            answer = owner.verified(self._question(guessed), drafting_s)
            if answer is None:
                return [self._own()]
            if answer.tokens:
                self._held = len(self._text) + len(answer.tokens)
                return list(answer.tokens[: room + 1])
            self._held = 0  # the text was forgotten there
        owner.go_alone("the coordinator does not keep this text")
        return [self._own()]

    def _question(self, guessed: Tokens) -> VerifyDraft:
        # The last token held is sent again, so that there is always something to read.
        at = max(0, min(self._held, len(self._text)) - 1)
        sampling = self._sampling
        return VerifyDraft(
            self._task,
            self._owner.tokenizer,
            at,
            tuple(self._text[at:]),
            tuple(guessed),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )

    def _own(self) -> int:
        logits = self._draft.logits(self._text)
        p = self._sampling.probabilities(logits)
        return int(self._rng.choice(len(p), p=p))
