"""Several turns with one model; what was read stays read.

Knows messages, and which tokens the model's attention cache holds. Does not know bundles or how
text is written (answer.py).

Each turn the whole conversation is put through the chat template. The cache keeps the longest
beginning of its tokens that is still right, so that as a rule only the new turn is read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from edge_sdk.answer import Answer
from edge_sdk.errors import RuntimeFailure
from edge_sdk.generation import Options, Request
from edge_sdk.prompts import Tokens

if TYPE_CHECKING:
    from edge_sdk.runtime import SlmSession


class Conversation:
    """A dialogue with `session`, for one thread at a time; also a context manager.

    Changing the adapter or the sampling options between turns means reading everything once more.

    Attributes:
        messages: role and content of each turn, the system's first; a list of its own.
    """

    def __init__(self, session: "SlmSession", system: str = "") -> None:
        self._session, self._system = session, system
        self._answer: Answer | None = None
        self._generator: Any = None
        self._key: object = None  # of the generator: what it was made for
        self._ids: Tokens = []  # the tokens of `_text`, as they were read and written
        self._text = ""
        self.messages: list[Mapping[str, str]] = []
        self.reset()

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str, **options: Unpack[Options]) -> Answer:
        """Return the answer to `text`, to be read to its end or closed before the next turn.

        A turn that is refused, or cancelled before its first token, leaves no trace.

        Raises:
            RuntimeFailure: an empty text, a full context, or an option as in `SlmSession.stream`.
        """
        self._finish()
        if not text.strip():
            raise RuntimeFailure("the text to answer is empty")
        session = self._session
        request = session.request(options, chat=True)
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = session.chat_prompt(messages)
        ids = self._tokens(prompt)
        if len(ids) >= session.context:
            raise RuntimeFailure(
                f"the conversation has {len(ids)} tokens and the model's context is "
                f"{session.context}; begin anew with reset(), or say less"
            )
        generator, keep = self._reader(request, ids)

        def ended(answer: Answer) -> None:
            if answer.tokens or answer.finish == "stop":
                said, shown = answer.settled()
                self._ids, self._text = ids + said, prompt + shown
                self.messages = [*messages, {"role": "assistant", "content": answer.text}]

        self._answer = session.answer(
            generator, request, unread=ids[keep:], prompt_tokens=len(ids), ended=ended
        )
        return self._answer

    def reset(self) -> None:
        """Forget everything but the system's words."""
        self.close()
        self._ids, self._text = [], ""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def close(self) -> None:
        """Free the attention cache; the next turn would read everything again."""
        self._finish()
        self._generator = self._key = None

    def _finish(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _tokens(self, prompt: str) -> Tokens:
        """The prompt's tokens, those already settled as they are: a text has several spellings."""
        if self._text and prompt.startswith(self._text):
            rest = prompt[len(self._text) :]
            return self._ids + self._session.encode(rest, special=False)
        return self._session.encode(prompt)

    def _reader(self, request: Request, ids: Tokens) -> tuple[Any, int]:
        """A generator, and how many of `ids` it has read."""
        context = self._session.context
        if (
            request.schema
        ):  # a grammar begins with a new generator, which the next turn has no use for
            return self._session.generator(request, limit=context), 0
        key = replace(request, max_tokens=1, stop=(), time_s=1, cancel=None)  # what genai is told
        if self._generator is None or key != self._key:
            self._generator = None  # its cache goes before the next one comes
            self._generator = self._session.generator(request, limit=context)
            self._key = key
            return self._generator, 0
        held = self._generator.get_sequence(0).tolist()
        # The last token held was picked but never read; and one must be read to go on at all.
        keep = min(_common(held, ids), len(held) - 1, len(ids) - 1)
        self._generator.rewind_to(max(0, keep))
        return self._generator, max(0, keep)


def _common(first: Tokens, second: Tokens) -> int:
    """How many tokens both begin with."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))
