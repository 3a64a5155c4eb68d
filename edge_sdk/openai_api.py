"""OpenAI's interface over local models: a parsed request in, session calls, answer objects out.

Knows which session serves a name and what a request becomes there. Does not know sockets, turns or
keys, nor the forms of answers (openai_answers.py).

Work is prepared first and done later: `chat`, `completion` and `embedding` refuse at once what can
be refused without the model, and return a `Job` that is run when it is its turn.
"""

import base64
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from edge_sdk.dialogues import Dialogues, say
from edge_sdk.errors import RuntimeFailure
from edge_sdk.generation import MAX_SEED
from edge_sdk.openai_answers import (
    Choices,
    Events,
    Json,
    chat_answer,
    chat_events,
    text_answer,
    text_events,
)
from edge_sdk.openai_requests import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    parse,
)

if TYPE_CHECKING:
    from edge_sdk.answer import Answer

_Found = TypeVar("_Found")
Job = Callable[[threading.Event], Json | Events]
"""Runs the model; the event cancels it. The model refuses before a stream begins, not in it."""

COMPLETION_TOKENS = 16
"""Tokens of /v1/completions where the request names no number: OpenAI's default."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one answer may take: tokens, and seconds (None: no limit)."""

    max_tokens: int = 1024
    time_s: float | None = 300.0


class Api:
    """Serves `models`, name to session; `BASE:ADAPTER` names an adapter that a session holds.

    `models` may change while it is served; every request looks anew.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        *,
        limits: Limits | None = None,
        now: Callable[[], float] = time.time,
        name: Callable[[], str] = lambda: secrets.token_hex(12),
    ) -> None:
        """`now` gives seconds since 1970, `name` a new name for each answer."""
        self._models, self._now, self._name = models, now, name
        self._limits = limits or Limits()
        self._dialogues = Dialogues()

    def close(self) -> None:
        """Free what is kept between requests; the sessions stay the caller's."""
        self._dialogues.close()

    # --- what there is ------------------------------------------------------------------------

    def models(self) -> Json:
        """Return the list of models, adapters as models of their own."""
        return {"object": "list", "data": [self._card(name) for name in self._names()]}

    def model(self, name: str) -> Json:
        """Return one model's entry.

        Raises:
            ApiError: 404, no such model.
        """
        self._find(name)
        return self._card(name)

    def _names(self) -> list[str]:
        return [
            name
            for base, session in self._models.items()
            for name in (base, *(f"{base}:{adapter}" for adapter in _adapters(session)))
        ]

    def _card(self, name: str) -> Json:
        session, _ = self._find(name)
        try:
            created = int(session.folder.stat().st_mtime)
        except OSError:
            created = 0
        return {"id": name, "object": "model", "created": created, "owned_by": "symbiont"}

    def _find(self, name: str) -> tuple[Any, str | None]:
        """The session and the adapter that `name` means."""
        session = self._models.get(name)
        if session is not None:
            return session, None
        base, _, adapter = name.partition(":")
        session = self._models.get(base)
        if session is None or adapter not in _adapters(session):
            raise ApiError(
                404,
                f"there is no model {name[:80]!r} here; there is {', '.join(self._names())}",
                code="model_not_found",
                param="model",
            )
        return session, adapter

    # --- work ---------------------------------------------------------------------------------

    def chat(self, body: bytes) -> Job:
        """Prepare POST /v1/chat/completions.

        Raises:
            ApiError: refused without asking the model.
        """
        wanted = parse(body, ChatRequest)
        session, adapter = self._writer(wanted.model)
        options = self._options(wanted, adapter, wanted.max_completion_tokens or wanted.max_tokens)
        messages = wanted.turns()
        if not any(message["content"].strip() for message in messages):
            raise ApiError(400, "the messages are empty", code="invalid_value", param="messages")
        frame = self._frame("chatcmpl-", wanted.model, session)
        n = wanted.n or 1

        def job(cancel: threading.Event) -> Json | Events:
            held = ExitStack()
            talk = held.enter_context(self._dialogues.taken(wanted.model, session))

            def begin(index: int) -> "Answer":
                chosen = _seeded(options, index) | {"cancel": cancel}
                return _obeyed(
                    lambda: say(session, talk, messages, chosen),
                    lambda: session.count(session.chat_prompt(messages)),
                    session,
                )

            choices = Choices(begin, count=n, n=n, held=held)
            if wanted.stream:
                return chat_events(frame, choices, usage=wanted.wants_usage())
            return chat_answer(frame, choices)

        return job

    def completion(self, body: bytes) -> Job:
        """Prepare POST /v1/completions.

        Raises:
            ApiError: refused without asking the model.
        """
        wanted = parse(body, CompletionRequest)
        session, adapter = self._writer(wanted.model)
        options = self._options(wanted, adapter, wanted.max_tokens or COMPLETION_TOKENS)
        prompts, n = wanted.prompts(), wanted.n or 1
        before = prompts if wanted.echo else [""] * len(prompts)
        frame = self._frame("cmpl-", wanted.model, session)

        def job(cancel: threading.Event) -> Json | Events:
            def begin(index: int) -> "Answer":
                prompt = prompts[index // n]
                chosen = _seeded(options, index % n) | {"cancel": cancel}

                def stream() -> "Answer":
                    answer: Answer = session.stream(prompt, **chosen)
                    return answer

                return _obeyed(stream, lambda: session.count(prompt), session)

            choices = Choices(begin, count=len(prompts) * n, n=n)
            if wanted.stream:
                return text_events(frame, choices, before, usage=wanted.wants_usage())
            return text_answer(frame, choices, before)

        return job

    def embedding(self, body: bytes) -> Job:
        """Prepare POST /v1/embeddings.

        Raises:
            ApiError: refused without asking the model.
        """
        wanted = parse(body, EmbeddingRequest)
        session, _ = self._find(wanted.model)
        texts = wanted.texts()
        if not hasattr(session, "embed"):
            raise ApiError(
                400,
                f"{wanted.model} writes text and has no embeddings; serve an encoder bundle",
                code="unsupported_model",
                param="model",
            )

        def job(cancel: threading.Event) -> Json:
            counts = [session.count(text) for text in texts]
            rows = _obeyed(lambda: session.embed(texts), lambda: max(counts), session)  # (n, d)
            _check_width(wanted, rows.shape[1])
            return {
                "object": "list",
                "model": wanted.model,
                "data": [
                    {"object": "embedding", "index": i, "embedding": _written(row, wanted)}
                    for i, row in enumerate(rows)
                ],
                "usage": {"prompt_tokens": sum(counts), "total_tokens": sum(counts)},
            }

        return job

    def _writer(self, name: str) -> tuple[Any, str | None]:
        session, adapter = self._find(name)
        if not _writes(session):
            raise ApiError(
                400,
                f"{name} is an encoder and writes no text; it serves /v1/embeddings",
                code="unsupported_model",
                param="model",
            )
        return session, adapter

    def _options(
        self, wanted: ChatRequest | CompletionRequest, adapter: str | None, max_tokens: int | None
    ) -> Json:
        """What the session is called with: what was asked for, and what must be bounded."""
        options: Json = {
            "max_tokens": min(max_tokens or self._limits.max_tokens, self._limits.max_tokens),
            "temperature": wanted.temperature or 0.0,
            "stop": wanted.stops(),
            "schema": wanted.schema(),
            "time_s": self._limits.time_s,
            "adapter": adapter,
        }
        for name in ("top_p", "top_k", "repetition_penalty", "seed"):
            if (value := getattr(wanted, name)) is not None:
                options[name] = value
        return options

    def _frame(self, prefix: str, model: str, session: Any) -> Json:
        return {
            "id": prefix + self._name(),
            "created": int(self._now()),
            "model": model,
            "system_fingerprint": session.release or session.folder.name,
        }


def _seeded(options: Json, index: int) -> Json:
    """Several answers to one prompt differ by their seeds; any integer of the client's is one."""
    if "seed" not in options:
        return options
    return options | {"seed": (options["seed"] + index) % (MAX_SEED + 1)}


def _obeyed(call: Callable[[], _Found], tokens: Callable[[], int], session: Any) -> _Found:
    """What `call` returns; what the session refuses is the client's error, and OpenAI has a code
    of its own for a prompt that is too long."""
    try:
        return call()
    except ApiError:
        raise
    except RuntimeFailure as exc:
        try:
            count = tokens()
        except RuntimeFailure:
            count = 0
        if count < session.context:
            raise ApiError(400, str(exc), code="invalid_value") from exc
        raise ApiError(
            400,
            f"the prompt has {count} tokens and this model's context is {session.context}; "
            "send less of it",
            code="context_length_exceeded",
        ) from exc


def _check_width(wanted: EmbeddingRequest, width: int) -> None:
    if wanted.dimensions not in (None, width):
        raise ApiError(
            400,
            f"dimensions: {wanted.model} has {width}, not {wanted.dimensions}; leave it out",
            code="unsupported_value",
            param="dimensions",
        )


def _written(row: npt.NDArray[np.float32], wanted: EmbeddingRequest) -> str | list[float]:
    if wanted.encoding_format == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return [float(x) for x in row]


def _writes(session: Any) -> bool:
    return hasattr(session, "conversation")


def _adapters(session: Any) -> Sequence[str]:
    """Those a request can choose: an encoder's adapter is the session's, not the request's."""
    return tuple(session.adapters) if _writes(session) else ()
