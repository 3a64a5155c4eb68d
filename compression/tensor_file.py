"""Tensors from elsewhere: safetensors read strictly; its own reader is not strict enough.

Knows the format's JSON head and our limits. Does not know what the tensors mean.

The library checks lengths, overlaps and offsets, and runs no code. It accepts a name twice, names
like `../../etc/x`, and a hundred thousand empty tensors (half a second of work in 5 MB); all of
these are refused here before it looks.
"""

import json
import re
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load

from compression.errors import CodecError

MAX_HEAD_BYTES = 4 * 2**20
MAX_TENSORS = 16_384
"""A rank-decomposed 70 B model has about 1,100 factors."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,255}")


def read(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors of a safetensors blob as numpy arrays by name, and its metadata.

    Raises:
        CodecError: not such a blob, over a limit, a name twice or a name that is none.
    """
    metadata = _check_head(data)
    try:
        return load(data), metadata
    except (SafetensorError, KeyError, ValueError, TypeError) as exc:
        raise CodecError(f"not a tensor file: {exc}") from exc


def _check_head(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(MAX_HEAD_BYTES, len(data) - 8):
        raise CodecError(f"a tensor file of {len(data)} bytes with a head of {length}")
    try:
        head = json.loads(data[8 : 8 + length], object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError is a ValueError
        raise CodecError(f"not a tensor file: {exc}") from exc
    metadata = head.pop("__metadata__", {}) if isinstance(head, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CodecError("not a tensor file: its head is no record")
    if len(head) > MAX_TENSORS:
        raise CodecError(f"{len(head)} tensors are over the limit of {MAX_TENSORS}")
    for name in head:
        if not _NAME.fullmatch(name) or ".." in name:
            raise CodecError(f"{name[:80]!r} is not the name of a tensor")
    return metadata


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
