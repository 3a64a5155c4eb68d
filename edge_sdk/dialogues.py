"""Conversations that live on between requests: a chat's next turn is not read from its start.

Knows sessions and conversations. Does not know requests. A client of the OpenAI interface sends
the whole conversation each time; what of it the model read last time stays read.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from edge_sdk.answer import Answer
from edge_sdk.conversation import Conversation


class Dialogues:
    """One kept conversation per model; safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[Any, Conversation]] = {}

    @contextmanager
    def taken(self, model: str, session: Any) -> Iterator[Conversation]:
        """The conversation kept for `model`, or a new one while somebody else has it.

        It is kept again at the end, unless an error made what it holds doubtful or the model has
        another session by now.
        """
        with self._lock:
            held, talk = self._kept.pop(model, (None, None))
        if talk is None or held is not session:
            talk = session.conversation()
        yield talk
        with self._lock:
            self._kept[model] = session, talk

    def close(self) -> None:
        """Free what is kept."""
        with self._lock:
            self._kept.clear()


def say(
    session: Any,
    talk: Conversation,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
) -> Answer:
    """Return the answer to `messages`, by way of `talk` where the user spoke last.

    Raises:
        RuntimeFailure: as `SlmSession.stream`.
    """
    *before, last = messages
    if last["role"] != "user" or not last["content"].strip():
        answer: Answer = session.stream(session.chat_prompt(messages), **options)
        return answer
    if "seed" in options:
        talk.close()  # its generator's dice have been thrown before; a seed begins with new ones
    talk.messages = [*before]
    return talk.say(last["content"], **options)
