"""The coordinator's half of speculation: a device guesses, the large model says what it takes.

Knows texts by device and task as the target has read them, and limits. Does not know envelopes or
topics (`serve` joins it to the courier's calls), nor how a device guesses.

Per text there is one key-value cache; the texts used longest ago are forgotten first, and a device
whose text was forgotten is told to send it again. Refused, in this order: another tokenizer, token
ids that the target does not have, a text that does not fit the context. Nothing of a text is
written down or logged.

Source: arXiv 2211.17192, Algorithm 1, its target half; drafts are greedy (PAPERS.md 4 f).
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_sdk.algorithms.rows import Rows
from edge_sdk.algorithms.speculative import Draft, Sampling, accept, ended
from edge_sdk.errors import FleetError
from edge_sdk.link.calls import Calls
from edge_sdk.wire.messages import AnyMessage, Refused, Verified, VerifyDraft

logger = logging.getLogger(__name__)

_TIMES = 5  # passes over one token timed at the start; the quickest counts


class Target(Protocol):
    """A model that verifies.

    Attributes:
        tokenizer: SHA-256 of its tokenizer.json.
        vocabulary: how many token ids it has; `context` how many tokens a text may have.
        ends: the tokens that end a text.
    """

    tokenizer: bytes
    vocabulary: int
    context: int
    ends: frozenset[int]

    def rows(self) -> Rows:
        """Return a new text that nothing was read into."""


@dataclass(frozen=True, slots=True)
class VerifierLimits:
    """`texts` held at once, of them `per_device`; a text unused for `idle_s` seconds is dropped.

    `draft`: most tokens of a draft that are looked at; what is beyond is ignored, not refused.
    """

    texts: int = 64
    per_device: int = 4
    idle_s: float = 600.0
    draft: int = 16


@dataclass(slots=True)
class _Text:
    rows: Rows
    tokens: list[int]
    used: float


class Verifier:
    """Verifies drafts with `target`; one at a time.

    Attributes:
        one_s: seconds of a pass over one token, measured at the start.
    """

    def __init__(
        self,
        target: Target,
        *,
        rng: np.random.Generator,
        limits: VerifierLimits | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._target, self._rng, self._clock = target, rng, clock
        self._limits = limits or VerifierLimits()
        self._texts: OrderedDict[tuple[str, str], _Text] = OrderedDict()
        self.one_s = self._measured()

    def serve(self, calls: Calls) -> None:
        """Answer the devices' VerifyDraft questions from now on, until `calls` is closed."""
        calls.answer_with(self.answer)

    def answer(self, device: str, question: AnyMessage) -> Verified | Refused | None:
        """Return what becomes of a device's draft; None for what is no draft."""
        if not isinstance(question, VerifyDraft):
            return None
        fault = self._fault(question)
        if fault:
            return Refused(question.task_id, fault)
        try:
            return self._verify(device, question)
        except (FleetError, RuntimeError, MemoryError) as exc:
            logger.exception("a draft of %s could not be verified", device[:12])
            self._texts.pop((device, question.task_id), None)
            return Refused(question.task_id, f"the target failed ({type(exc).__name__})")

    @property
    def held(self) -> int:
        """How many texts are held."""
        return len(self._texts)

    def _fault(self, asked: VerifyDraft) -> str:
        target = self._target
        if asked.tokenizer != target.tokenizer:
            return (
                f"the draft's tokenizer is {asked.tokenizer.hex()[:12]} and the target's "
                f"{target.tokenizer.hex()[:12]}; a draft needs the very same one"
            )
        high = max((*asked.text, *asked.draft), default=0)
        if high >= target.vocabulary:
            return f"token {high} is outside the target's vocabulary of {target.vocabulary}"
        length = asked.at + len(asked.text)
        if not asked.text or length >= target.context:
            return f"a text of {length} tokens does not fit the context of {target.context}"
        return ""

    def _verify(self, device: str, asked: VerifyDraft) -> Verified:
        text = self._text(device, asked)
        if text is None:
            return Verified(asked.task_id, (), 0, 0.0, self.one_s)
        text.tokens[asked.at :] = asked.text
        room = self._target.context - len(text.tokens) - 1
        draft = list(asked.draft[: max(0, min(self._limits.draft, room))])
        begun = self._clock()
        text.rows.rewind(min(asked.at, len(text.tokens) - 1))
        unread = text.tokens[text.rows.length :]
        logits = text.rows.read([*unread, *draft])[len(unread) - 1 :]
        sampling = Sampling(asked.temperature, asked.top_k, asked.top_p or 1.0)
        step = ended(
            accept(Draft(draft), sampling.probabilities(logits), self._rng), self._target.ends
        )
        text.rows.rewind(len(text.tokens) + step.accepted)
        text.tokens += step.tokens
        pass_s = max(0.0, self._clock() - begun)
        return Verified(asked.task_id, tuple(step.tokens), step.accepted, pass_s, self.one_s)

    def _text(self, device: str, asked: VerifyDraft) -> _Text | None:
        """The text as it was at `at` tokens, None if it is not held."""
        now, name = self._clock(), (device, asked.task_id)
        for old in [k for k, t in self._texts.items() if now - t.used > self._limits.idle_s]:
            del self._texts[old]
        if asked.at == 0:
            self._texts.pop(name, None)
            self._make_room(device)
            self._texts[name] = _Text(self._target.rows(), [], now)
        text = self._texts.get(name)
        if text is None or len(text.tokens) < asked.at:
            return None
        self._texts.move_to_end(name)
        text.used = now
        return text

    def _make_room(self, device: str) -> None:
        own = [name for name in self._texts if name[0] == device]
        for name in own[: max(0, len(own) - self._limits.per_device + 1)]:
            del self._texts[name]
        while len(self._texts) >= self._limits.texts:
            self._texts.popitem(last=False)

    def _measured(self) -> float:
        rows, times = self._target.rows(), []
        rows.read([0])
        for _ in range(_TIMES):
            begun = self._clock()
            rows.read([0])
            times.append(self._clock() - begun)
            rows.rewind(1)
        return max(0.0, min(times))
