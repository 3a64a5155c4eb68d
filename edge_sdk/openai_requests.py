"""What a client of the OpenAI interface may ask of a model here, field by field.

Knows the request bodies and why one is refused. Does not know sockets, sessions or answers.

Three kinds of fields: those that are obeyed; those that cannot change an answer here and are let
pass (`user`, `store`, ...); everything else is refused by name, because a setting that is silently
not obeyed is worse than an error. A field set to null counts as left out.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from edge_sdk.errors import RuntimeFailure

MAX_CHOICES = 8
"""Most answers to one prompt; they are made one after the other."""
MAX_STOPS = 16
MAX_PROMPTS = 32
MAX_INPUTS = 512
"""Most texts of one embeddings request."""

_Tokens = Annotated[int, Meta(ge=1, le=1 << 20)]
_Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
_Stop = str | Annotated[list[str], Meta(max_length=MAX_STOPS)]
_Text = Annotated[str, Meta(min_length=1)]
_Json = dict[str, Any]


class ApiError(RuntimeFailure):
    """A refusal in OpenAI's form; `status` is HTTP's, `param` the field at fault if it is one."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> _Json:
        """Return the JSON object that is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        said = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": said}


class _Part(Struct, frozen=True):
    type: str
    text: str = ""


class Message(Struct, frozen=True):
    """One turn of a conversation; other fields, as clients send them back to us, mean nothing."""

    role: str
    content: str | list[_Part] | None = None
    tool_calls: object = None


class _StreamOptions(Struct, frozen=True):
    include_usage: bool = False
    include_obfuscation: object = None


class _JsonSchema(Struct, frozen=True):
    name: str = ""
    schema: _Json | None = None
    strict: bool | None = None
    description: object = None


class _Format(Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _Wanted(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of both kinds of completion; `top_k` and `repetition_penalty` are additions of ours.

    `temperature` left out means 0, the likeliest answer: OpenAI's default of 1 suits models a
    thousand times larger.
    """

    model: _Text
    max_tokens: _Tokens | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    seed: int | None = None
    stop: _Stop | None = None
    n: _Choices | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: _Format | None = None
    user: object = None

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: _Json | None = None
    logprobs: bool | int | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return tuple(text for text in given if text)

    def schema(self) -> _Json | None:
        """Return the JSON schema the answer must fit, None for free text.

        Raises:
            ApiError: a json_schema format without its schema.
        """
        if self.response_format is None or self.response_format.type == "text":
            return None
        if self.response_format.type == "json_object":
            return {"type": "object"}
        given = self.response_format.json_schema
        if given is None or given.schema is None:
            raise ApiError(
                400,
                "response_format of type json_schema needs json_schema.schema",
                code="missing_required_parameter",
                param="response_format",
            )
        return given.schema

    def wants_usage(self) -> bool:
        """Return whether a stream shall end with the tokens' counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Wanted, frozen=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: _Tokens | None = None

    metadata: object = None
    store: object = None
    service_tier: object = None
    safety_identifier: object = None
    prompt_cache_key: object = None
    prompt_cache_options: object = None
    prompt_cache_retention: object = None
    parallel_tool_calls: object = None
    reasoning_effort: object = None
    verbosity: object = None

    tools: list[object] | None = None
    tool_choice: object = None
    functions: list[object] | None = None
    function_call: object = None
    top_logprobs: int | None = None
    modalities: list[str] | None = None
    audio: object = None
    prediction: object = None
    moderation: object = None
    web_search_options: object = None

    def turns(self) -> list[dict[str, str]]:
        """Return the messages as role and text, `developer` written as `system`.

        Raises:
            ApiError: a role or a kind of content that no model here takes.
        """
        return [_turn(i, message) for i, message in enumerate(self.messages)]


class CompletionRequest(_Wanted, frozen=True):
    """The body of POST /v1/completions."""

    prompt: _Text | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None
    """Answers are not ranked here."""

    def prompts(self) -> list[str]:
        """Return the prompts.

        Raises:
            ApiError: too many, or token ids in place of text.
        """
        return _texts(self.prompt, "prompt", MAX_PROMPTS)


class EmbeddingRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/embeddings."""

    model: _Text
    input: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: object = None

    def texts(self) -> list[str]:
        """Return the texts.

        Raises:
            ApiError: too many, or token ids in place of text.
        """
        return _texts(self.input, "input", MAX_INPUTS)


_Request = TypeVar("_Request", ChatRequest, CompletionRequest, EmbeddingRequest)


def parse(body: bytes, kind: type[_Request]) -> _Request:
    """Return the request that `body` holds.

    Raises:
        ApiError: not JSON, a field that is wrong or unknown, or one that asks for what no model
            here can do.
    """
    try:
        found = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise _invalid(str(exc), kind) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ApiError(400, f"the request body is not JSON: {exc}", code="invalid_json") from exc
    for name, advice in _REFUSED.items():
        value = getattr(found, name, None)
        if value not in (None, False, 0, [], {}, "", "none", ["text"]):
            raise ApiError(400, f"{name}: {advice}", code="unsupported_parameter", param=name)
    return found


_REFUSED: Mapping[str, str] = {
    "tools": "models here call no tools; ask for JSON with response_format and call it yourself",
    "functions": "models here call no functions; ask for JSON with response_format",
    "function_call": "models here call no functions; leave it out",
    "logprobs": "log-probabilities are not returned; leave it out",
    "top_logprobs": "log-probabilities are not returned; leave it out",
    "logit_bias": "tokens cannot be biased; leave it out",
    "frequency_penalty": "not available; use repetition_penalty, a number above 1",
    "presence_penalty": "not available; use repetition_penalty, a number above 1",
    "modalities": 'models here write text only; leave it out or give ["text"]',
    "audio": "models here write text only; leave it out",
    "prediction": "not available; leave it out",
    "moderation": "nothing is moderated here; leave it out",
    "web_search_options": "nothing here reaches a network; leave it out",
    "suffix": "models here only write onwards; leave it out",
}


def _turn(position: int, message: Message) -> dict[str, str]:
    where = f"messages[{position}]"
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant") or message.tool_calls:
        raise ApiError(
            400,
            f"{where}: models here call no tools; roles are system, user and assistant, "
            f"not {message.role[:20]!r}",
            code="unsupported_value",
            param=where,
        )
    parts = [message.content] if isinstance(message.content, str) else message.content or []
    texts = []
    for part in parts:
        if not isinstance(part, str) and part.type != "text":
            raise ApiError(
                400,
                f"{where} holds {part.type[:20]!r}; models here read text only",
                code="unsupported_value",
                param=where,
            )
        texts.append(part if isinstance(part, str) else part.text)
    return {"role": role, "content": "".join(texts)}


def _texts(given: str | list[str | int | list[int]], name: str, most: int) -> list[str]:
    if isinstance(given, str):
        return [given]
    if len(given) > most and all(isinstance(item, str) for item in given):
        raise ApiError(
            400,
            f"{name} holds {len(given)} texts; at most {most} fit into one request",
            code="array_above_max_length",
            param=name,
        )
    texts = [item for item in given if isinstance(item, str)]
    if len(texts) != len(given):
        raise ApiError(
            400,
            f"{name} holds token ids, which another model's tokenizer made; send text",
            code="unsupported_value",
            param=name,
        )
    return texts


def _invalid(said: str, kind: type[Any]) -> ApiError:
    """msgspec's sentence, with the field named as OpenAI names it."""
    if unknown := re.search(r"unknown field `(.+?)`", said):
        name = unknown[1]
        near = difflib.get_close_matches(name, kind.__struct_fields__, 1)
        advice = f"did you mean {near[0]}?" if near else "leave it out"
        message = f"{name[:40]} is not a field of this request; {advice}"
        return ApiError(400, message, code="unknown_parameter", param=name[:40])
    if missing := re.search(r"missing required field `(.+?)`", said):
        message = f"the request lacks {missing[1]}"
        return ApiError(400, message, code="missing_required_parameter", param=missing[1])
    place = re.search(r" - at `\$\.?(.*?)`", said)
    param = place[1] if place and place[1] else None
    reason = said.split(" - at ")[0]
    message = f"{param or 'the request'}: {reason[:1].lower()}{reason[1:]}"
    return ApiError(400, message, code="invalid_value", param=param)
