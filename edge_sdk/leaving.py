"""What would leave this device, field by field, read from the real messages and not from a promise.

Knows the vocabulary's device half. Does not know how messages travel; it only counts and names.
"""

from collections.abc import Iterable
from typing import get_args

import msgspec
from msgspec import Struct

from edge_sdk.wire.messages import (
    AdapterUpdate,
    AnyMessage,
    Enrol,
    ModelReport,
    Refused,
    Scores,
    WantFiles,
)

DEVICE_KINDS = (Enrol, WantFiles, ModelReport, AdapterUpdate, Scores, Refused)
"""Every message a device sends; there is no other way out of this process."""


class Leaving(Struct, frozen=True):
    """One field of one message: its bytes, who can open it, and under which key.

    state: "waiting" (in the outbox now), "sent" (the last one of its kind) or "possible" (none yet;
    bytes are 0). key: hexadecimal id of the receive key it is sealed to, "" while unknown.
    """

    message: str
    field: str
    content: str
    bytes: int
    to: str
    key: str
    state: str


def fields_of(message: AnyMessage) -> dict[str, int]:
    """Return the encoded size in bytes of each field of `message`."""
    encode = msgspec.msgpack.encode
    return {name: len(encode(getattr(message, name))) for name in message.__struct_fields__}


def explain_message(message: AnyMessage, *, to: str, key: str, state: str) -> list[Leaving]:
    """Return one row per field of `message`."""
    kind = type(message)
    content = _contents(kind)
    return [
        Leaving(kind.__name__, name, content[name], size, to, key, state)
        for name, size in fields_of(message).items()
    ]


def explain_sizes(
    kind: str, sizes: dict[str, int], *, to: str, key: str, state: str
) -> list[Leaving]:
    """Return one row per field of a message that is gone, from its remembered sizes."""
    known = {cls.__name__: cls for cls in DEVICE_KINDS}
    content = _contents(known[kind]) if kind in known else {}
    return [
        Leaving(kind, name, content.get(name, ""), size, to, key, state)
        for name, size in sizes.items()
    ]


def explain_possible(missing: Iterable[str], *, to: str, key: str) -> list[Leaving]:
    """Return one row per field of each kind in `missing`, of which none was sent yet."""
    wanted = set(missing)
    return [
        Leaving(cls.__name__, name, content, 0, to, key, "possible")
        for cls in DEVICE_KINDS
        if cls.__name__ in wanted
        for name, content in _contents(cls).items()
    ]


def _contents(cls: type) -> dict[str, str]:
    return {item.encode_name: _type_name(item.type) for item in msgspec.structs.fields(cls)}


def _type_name(kind: object) -> str:
    plain = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    arguments = [a for a in get_args(plain) if a is not Ellipsis]
    name = getattr(plain, "__name__", str(plain))
    return f"{name} of {', '.join(_type_name(a) for a in arguments)}" if arguments else name
