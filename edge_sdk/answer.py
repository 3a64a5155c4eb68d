"""An answer while it is written: tokens from genai become text, until something ends it.

Knows generators, tokenizers and a request's limits. Does not know bundles, prompts or sessions.
"""

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edge_sdk.errors import RuntimeFailure
from edge_sdk.generation import Request
from edge_sdk.prompts import READ_TOKENS, Tokens
from edge_sdk.stops import StopFilter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Finish = Literal["", "stop", "length", "time", "cancelled"]


class Strand:
    """One text as it grows from tokens.

    Attributes:
        tokens: the ids so far, end tokens not among them.
        text: what may be shown so far.
        finish: why it ended, "" while it has not.
    """

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[str], ends: frozenset[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._ends, self._stops = tokenizer, ends, StopFilter(stops)
        self._fresh = lambda: DecodeStream(skip_special_tokens=True)
        self._decoder = self._fresh()
        self._reach: list[int] = []  # characters decoded after each token, stop strings included
        self.tokens: Tokens = []
        self._shown: list[str] = []
        self.finish: Finish = ""

    @property
    def text(self) -> str:
        return "".join(self._shown)

    def feed(self, token: int) -> str:
        """Take the next token; return the text it adds, often "" in the middle of a character."""
        if token in self._ends:
            return self.end("stop")
        self.tokens.append(token)
        piece = self._decode(token)
        self._reach.append((self._reach[-1] if self._reach else 0) + len(piece))
        shown = self._stops.feed(piece) if piece else ""
        if self._stops.found:
            self.finish = "stop"
        if shown:
            self._shown.append(shown)
        return shown

    def _decode(self, token: int) -> str:
        try:
            return self._decoder.step(self._tokenizer, token) or ""
        except Exception:  # tokenizers raises it bare when bytes are not UTF-8: begin anew there
            self._decoder = self._fresh()
            return self._decoder.step(self._tokenizer, token) or ""

    def end(self, finish: Finish) -> str:
        """End the text for `finish`, unless it has ended; return what was held back."""
        if self.finish:
            return ""
        self.finish = finish
        rest = self._stops.end()
        if rest:
            self._shown.append(rest)
        return rest

    def settled(self) -> tuple[Tokens, str]:
        """Return the tokens that lie wholly within `text`, and the text they stand for."""
        text = self.text
        whole = bisect_right(self._reach, len(text))
        if not whole:
            return [], ""
        reach = self._reach[whole - 1]
        count = bisect_left(self._reach, reach) + 1  # not the bytes of a character left unfinished
        return self.tokens[: count if reach else 0], text[:reach]


class Answer(Iterator[str]):
    """The pieces of an answer, in order; also a context manager that closes it.

    Attributes:
        finish: "stop" (the model ended it, or a stop string did), "length", "time", "cancelled";
            "" while it is being written.
        prompt_tokens: tokens of the whole prompt.
        read_tokens: those of them that were read for this answer; the rest were known already.
        first_token_s: seconds from the request to the first token, 0.0 before it.
        tokens_per_s: speed after the first token, 0.0 before the second.
    """

    def __init__(
        self,
        generator: Any,
        strand: Strand,
        request: Request,
        *,
        unread: Tokens,
        prompt_tokens: int,
        limit: int,
        ended: "Callable[[Answer], None]",
    ) -> None:
        """`limit` is the most tokens of the answer; `ended` is called once, whatever the end."""
        self._strand, self._ended = strand, ended
        self.prompt_tokens, self.read_tokens = prompt_tokens, len(unread)
        self.first_token_s = self.tokens_per_s = 0.0
        self._started = time.perf_counter()
        self._open = True
        self._pieces = self._write(generator, request, unread, limit)

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            self.close()
            raise
        except RuntimeError as exc:
            self.close()
            raise failure(exc) from None

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def text(self) -> str:
        """What was shown so far."""
        return self._strand.text

    @property
    def tokens(self) -> Tokens:
        """The ids written so far, those of a stop string among them, end tokens not."""
        return self._strand.tokens

    @property
    def finish(self) -> Finish:
        return self._strand.finish

    def settled(self) -> tuple[Tokens, str]:
        """Return the tokens that lie wholly within `text`, and the text they stand for."""
        return self._strand.settled()

    def close(self) -> None:
        """End the answer where it is and free its memory; harmless when it has ended.

        For the thread that reads the answer; another one sets `cancel`.
        """
        if self._open:
            self._open = False
            self._pieces.close()
            self._strand.end("cancelled")
            self._ended(self)

    def _write(
        self, generator: Any, request: Request, unread: Tokens, limit: int
    ) -> Generator[str, None, None]:
        strand = self._strand
        for at in range(0, len(unread), READ_TOKENS):
            if stopped := stopped_by(request, self._started):
                strand.end(stopped)
                return
            generator.append_tokens(np.asarray([unread[at : at + READ_TOKENS]], np.int32))
        first = 0.0
        while not (stopped := stopped_by(request, self._started)):
            generator.generate_next_token()
            now = time.perf_counter()
            if not first:  # reading the prompt has another speed
                first, self.first_token_s = now, now - self._started
            token = int(generator.get_next_tokens()[0])
            piece = strand.feed(token)
            count = len(strand.tokens)
            if count > 1:
                self.tokens_per_s = (count - 1) / max(now - first, 1e-9)
            if not strand.finish and (count >= limit or generator.is_done()):
                piece += strand.end("length" if count >= limit else "stop")
            if piece:
                yield piece
            if strand.finish:
                return
        if rest := strand.end(stopped):
            yield rest


def failure(exc: RuntimeError) -> RuntimeFailure:
    """Return what to raise when genai fails in the middle of an answer."""
    # Only the first line, and not as a cause: genai goes on with the text of the answer, which
    # must not come into a log.
    reason = str(exc).partition("\n")[0][:200]
    return RuntimeFailure(f"the model could not go on with its answer: {reason}")


def stopped_by(request: Request, started: float) -> Finish:
    """Return what ends a request that `started` then, "" for nothing yet."""
    if request.cancel is not None and request.cancel.is_set():
        return "cancelled"
    if time.perf_counter() - started > request.time_s:
        return "time"
    return ""
