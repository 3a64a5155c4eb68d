"""Answers in the forms of the OpenAI interface: whole, and as events.

Knows those forms and answers of sessions. Does not know requests, models' names or sockets.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from edge_sdk.answer import Answer

Json = dict[str, Any]
Events = Generator[Json, None, None]


class Choices:
    """`count` answers, `n` to each prompt, one after the other.

    The first is begun at once, so that what the model refuses is refused before anything is sent.
    """

    def __init__(
        self, begin: Callable[[int], Answer], *, count: int, n: int, held: ExitStack | None = None
    ) -> None:
        """`begin(i)` begins answer i; `held` is closed when the last has ended well."""
        self.n, self._count = n, count
        self._begin, self._held = begin, held or ExitStack()
        self._read = self._known = self._written = 0
        self._first: Answer | None = begin(0)

    def answers(self) -> Iterator[tuple[int, Answer]]:
        """Yield each index and its answer, which is closed when the next one is asked for."""
        for index in range(self._count):
            answer, self._first = self._first or self._begin(index), None
            try:
                yield index, answer
            finally:
                answer.close()
                if index % self.n == 0:
                    self._read += answer.prompt_tokens
                    self._known += answer.prompt_tokens - answer.read_tokens
                self._written += len(answer.tokens)
        self._held.close()

    def whole(self) -> Iterator[tuple[int, str, str]]:
        """Yield index, text and reason of the end."""
        for index, answer in self.answers():
            text = "".join(answer)
            yield index, text, reason(answer)

    def usage(self) -> Json:
        """Return the tokens read and written so far; `cached_tokens` were read earlier."""
        return {
            "prompt_tokens": self._read,
            "completion_tokens": self._written,
            "total_tokens": self._read + self._written,
            "prompt_tokens_details": {"cached_tokens": self._known},
        }


def chat_answer(frame: Json, choices: Choices) -> Json:
    """Return a chat.completion object; `frame` holds id, model and time."""
    found = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": finish,
        }
        for index, text, finish in choices.whole()
    ]
    return frame | {"object": "chat.completion", "choices": found, "usage": choices.usage()}


def chat_events(frame: Json, choices: Choices, *, usage: bool) -> Events:
    """Yield chat.completion.chunk objects; with `usage` a last one with the tokens' counts."""
    frame = frame | {"object": "chat.completion.chunk"} | ({"usage": None} if usage else {})

    def event(index: int, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return frame | {"choices": [choice]}

    for index, answer in choices.answers():
        yield event(index, {"role": "assistant", "content": ""})
        for piece in answer:
            yield event(index, {"content": piece})
        yield event(index, {}, reason(answer))
    if usage:
        yield frame | {"choices": [], "usage": choices.usage()}


def text_answer(frame: Json, choices: Choices, before: Sequence[str]) -> Json:
    """Return a text_completion object; `before[i]` is put before each answer to prompt i."""
    found = [
        _text(index, before[index // choices.n] + text, finish)
        for index, text, finish in choices.whole()
    ]
    return frame | {"object": "text_completion", "choices": found, "usage": choices.usage()}


def text_events(frame: Json, choices: Choices, before: Sequence[str], *, usage: bool) -> Events:
    """Yield text_completion objects with the answers' pieces."""
    frame = frame | {"object": "text_completion"} | ({"usage": None} if usage else {})
    for index, answer in choices.answers():
        if before[index // choices.n]:
            yield frame | {"choices": [_text(index, before[index // choices.n], None)]}
        for piece in answer:
            yield frame | {"choices": [_text(index, piece, None)]}
        yield frame | {"choices": [_text(index, "", reason(answer))]}
    if usage:
        yield frame | {"choices": [], "usage": choices.usage()}


def reason(answer: Answer) -> str:
    """Return OpenAI's word for how `answer` ended: a limit of time is a limit of length."""
    return "stop" if answer.finish == "stop" else "length"


def _text(index: int, text: str, finish: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
