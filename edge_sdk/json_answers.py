"""JSON schemas that an answer must fit.

Knows schemas as text. Does not know models; onnxruntime-genai masks the tokens that would break
the schema (llguidance, part of its wheel), and it is the one that understands the schema.
"""

import json
from collections.abc import Mapping
from typing import Any

from edge_sdk.errors import RuntimeFailure

MAX_SCHEMA_BYTES = 256 * 1024
"""A larger schema is a mistake or an attack."""


def grammar(schema: Mapping[str, Any] | str) -> str:
    """Return `schema` as the JSON text that genai takes, without room for idle white space.

    Raises:
        RuntimeFailure: not a JSON object, or too large.
    """
    try:
        known = json.loads(schema) if isinstance(schema, str) else dict(schema)
        if not isinstance(known, dict):
            raise RuntimeFailure(f"the JSON schema is a {type(known).__name__}, not an object")
        # A small model left to choose white space may write nothing else until its limit.
        text = json.dumps({**known, "x-guidance": {"whitespace_flexible": False}})
    except (ValueError, TypeError, RecursionError) as exc:
        raise RuntimeFailure(f"the JSON schema is not JSON: {exc}") from exc
    if len(text) > MAX_SCHEMA_BYTES:
        raise RuntimeFailure(f"the JSON schema has {len(text)} bytes; allowed: {MAX_SCHEMA_BYTES}")
    return text


def check_whole(finish: str, tokens: int) -> None:
    """Check that an answer in JSON came to its own end: JSON that was cut off is no JSON.

    Raises:
        RuntimeFailure: it was cut off, after so many `tokens`.
    """
    if finish != "stop":
        raise RuntimeFailure(
            f"the JSON was cut off after {tokens} tokens ({finish}); allow more with max_tokens or "
            "time_s, or bound the schema's texts and lists"
        )
