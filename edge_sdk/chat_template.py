"""Messages as one prompt: the bundle's own chat template, or a plain form without one.

Knows messages and Jinja. Does not know models or tokens.
"""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_sdk.errors import RuntimeFailure

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"
ROLES = ("system", "user", "assistant", "tool")

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """Renders messages.

    Attributes:
        stops: texts at which an answer ends because the model would begin the user's next turn.
    """

    def __init__(self, folder: Path, *, borders: Sequence[str] = ()) -> None:
        """Read the template of the bundle in `folder`.

        `borders` are the texts of the tokenizer's special tokens, which mark where turns begin and
        end: within a message they are taken apart by a space, so that no message can pose as
        another's turn.

        Raises:
            RuntimeFailure: its files cannot be read.
        """
        self._source, self._specials = _read(folder)
        longest_first = sorted(filter(None, borders), key=len, reverse=True)
        self._borders = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._template: Any = None
        self._lock = threading.Lock()
        self.stops: tuple[str, ...] = () if self._source else ("\nUser:",)

    @property
    def begin(self) -> str:
        """The text of the token that begins a sequence, "" if unknown."""
        return self._specials.get("bos_token", "")

    def render(self, messages: Messages, *, answer: bool = True) -> str:
        """Return the prompt for `messages`; with `answer` the assistant's turn is begun.

        Raises:
            RuntimeFailure: no messages, an unknown role, or a template that refuses or fails.
        """
        _check(messages)
        messages = [
            {**message, "content": self._borders.sub(_apart, message["content"])}
            for message in messages
        ]
        if not self._source:
            return _plain(messages, answer)
        with self._lock:
            self._template = self._template or _compiled(self._source)
            text: str = self._template(
                messages=messages,
                add_generation_prompt=answer,
                **self._specials,
            )
        return text


def _compiled(source: str) -> Any:
    try:
        from edge_sdk.jinja_sandbox import compile_template
    except ImportError as exc:
        raise RuntimeFailure(
            "this bundle's chat template needs the infer extra: pip install 'symbiont[infer]' "
            f"({exc})"
        ) from exc
    return compile_template(source)


def _read(folder: Path) -> tuple[str, dict[str, str]]:
    """The template's source, "" for none, and the special tokens it may name."""
    try:
        path = folder / TOKENIZER_FILE
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path = folder / TEMPLATE_FILE
        source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    except (OSError, ValueError, RecursionError) as exc:
        raise RuntimeFailure(f"{path} cannot be read: {exc}") from exc
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default", "")
    specials = {
        key: value if isinstance(value, str) else str(value.get("content", ""))
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, (str, dict))
    }
    return source or "", specials


def _check(messages: Messages) -> None:
    if not messages:
        raise RuntimeFailure("there are no messages to answer")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RuntimeFailure(f"a message has the role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise RuntimeFailure(f"the content of a message is a {type(content).__name__}, no text")


def _apart(found: re.Match[str]) -> str:
    return f"{found[0][:1]} {found[0][1:]}"


def _plain(messages: Messages, answer: bool) -> str:
    lines = []
    for message in messages:
        role, text = str(message["role"]), str(message["content"])
        if role != "assistant":
            text = text.strip()
        # What the model wrote stays as it is, so that it need not be read again.
        space = "" if text[:1].isspace() else " "
        lines.append(f"{role.capitalize()}:{space}{text}\n")
    return "".join(lines) + ("Assistant:" if answer else "")
