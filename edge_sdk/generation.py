"""What a request for text may ask, its limits, and how genai is told.

Knows the options and their ranges. Does not know models, tokens or the answer (answer.py).
"""

import math
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from edge_sdk.errors import RuntimeFailure
from edge_sdk.json_answers import grammar

MAX_STOPS = 64
"""Each is looked for in every piece of text."""
MAX_SEED = 2**31 - 1
"""genai takes a signed 32-bit number, and reads -1 as "any"."""


class Options(TypedDict, total=False):
    """Options of `generate`, `stream`, `generate_many` and `Conversation.say`, all optional.

    `max_tokens`: most tokens of the answer. `stop`: texts that end it and are not shown.
    `temperature`: 0 takes the likeliest token, more samples. `top_p` in (0, 1] and `top_k` (0: off)
    narrow the sampling, `seed` repeats it. `repetition_penalty`: above 1 disfavours what was said.
    `schema`: a JSON schema, as a mapping or JSON text, that the answer fits. `time_s`: seconds from
    the call after which the answer ends as it is. `cancel`: ends it once it is set, from any
    thread. `adapter`: the name of a loaded adapter, "" for the plain model, None for the session's.
    """

    max_tokens: int | None
    stop: Sequence[str] | str
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None
    schema: Mapping[str, Any] | str | None
    time_s: float | None
    cancel: threading.Event | None
    adapter: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`Options` with defaults filled in and checked; see there."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    schema: str = ""
    time_s: float = math.inf
    cancel: threading.Event | None = None
    adapter: str | None = None

    @classmethod
    def of(cls, options: Options, *, max_tokens: int) -> "Request":
        """Return the request for `options`; `max_tokens` is what an answer may have by default.

        Raises:
            RuntimeFailure: an unknown option, a value out of its range, or not a JSON schema.
        """
        known = {field.name for field in fields(cls)}
        strange = sorted(options.keys() - known)
        if strange:
            raise RuntimeFailure(
                f"unknown option {strange[0]!r}; known are {', '.join(sorted(known))}"
            )
        given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
        try:
            if isinstance(stop := given.get("stop", ()), str):
                stop = (stop,)
            given["stop"] = tuple(stop)
            if "schema" in given:
                given["schema"] = grammar(given["schema"])
            request = cls(**{"max_tokens": max_tokens, **given})
            request._check()
        except TypeError as exc:
            raise RuntimeFailure(f"an option is of the wrong kind: {exc}") from exc
        return request

    def _check(self) -> None:
        _within("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        _within("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100")
        _within("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _within("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        penalty = self.repetition_penalty
        _within("repetition_penalty", penalty, 0 < penalty <= 100, "above 0, at most 100")
        seed = self.seed
        _within("seed", seed, seed is None or 0 <= seed <= MAX_SEED, f"0 to {MAX_SEED}")
        _within("time_s", self.time_s, self.time_s > 0, "above 0")
        _within("stop", len(self.stop), len(self.stop) <= MAX_STOPS, f"at most {MAX_STOPS} texts")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RuntimeFailure("stop has an empty text; allowed: texts of a character or more")

    def search(self) -> dict[str, Any]:
        """Return genai's search options for this request."""
        search: dict[str, Any] = {"repetition_penalty": float(self.repetition_penalty)}
        # Without a seed genai 0.18 asks the processor for 2.5 kB of entropy: 12 ms per request.
        if not self.temperature:  # genai divides by it
            return {**search, "do_sample": False, "random_seed": 0}
        search |= {"do_sample": True, "temperature": float(self.temperature)}
        search |= {"top_p": float(self.top_p), "top_k": int(self.top_k)}
        search["random_seed"] = secrets.randbelow(MAX_SEED) if self.seed is None else int(self.seed)
        return search


def _within(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise RuntimeFailure(f"{name} is {value}; allowed: {allowed}")
