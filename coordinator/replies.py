"""Which reply belongs to which task, and what in a reply can be checked without any model.

Knows the vocabulary's pairs. Does not know who answered, nor what the figures are for; shapes and
finiteness of adapters are the program's own check (`Ask.check`), which alone knows codecs.
"""

import math
from typing import Self

import msgspec
from msgspec import Struct

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.wire.messages import (
    AdapterUpdate,
    AnyMessage,
    ModelReport,
    OfferModel,
    Score,
    Scores,
    TrainAdapter,
)

EXPECTED = {"TrainAdapter": "AdapterUpdate", "Score": "Scores", "OfferModel": "ModelReport"}
"""The reply to each task; a task not named here has none."""


class Expected(Struct, frozen=True):
    """What the reply to one task must say; None where it may say anything."""

    kind: str | None = None
    release: str | None = None
    round: int | None = None
    count: int | None = None

    @classmethod
    def of(cls, task: AnyMessage) -> Self:
        """Return what the reply to `task` must say."""
        return cls(
            kind=EXPECTED.get(type(task).__name__),
            release=task.release if isinstance(task, TrainAdapter | OfferModel) else None,
            round=task.round if isinstance(task, TrainAdapter) else None,
            count=len(task.texts) if isinstance(task, Score) else None,
        )

    def to_text(self) -> str:
        """Return JSON, for the store."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return what `to_text` wrote."""
        return msgspec.json.decode(text, type=cls)


def check_reply(reply: AnyMessage, expected: Expected) -> None:
    """Check a reply against its task.

    Raises:
        RemoteProtocolError: of the wrong type, release, round or length, or not finite.
    """
    kind = type(reply).__name__
    if kind != expected.kind:
        raise RemoteProtocolError(f"a {kind} where {expected.kind or 'nothing'} was asked")
    if isinstance(reply, AdapterUpdate | ModelReport) and reply.release != expected.release:
        raise RemoteProtocolError(f"about release {reply.release}, asked was {expected.release}")
    if isinstance(reply, AdapterUpdate) and reply.round != expected.round:
        raise RemoteProtocolError(f"of round {reply.round}, asked was round {expected.round}")
    if isinstance(reply, Scores) and len(reply.scores) != expected.count:
        raise RemoteProtocolError(f"{len(reply.scores)} scores for {expected.count} texts")
    if not all(math.isfinite(number) for number in _numbers(reply)):
        raise RemoteProtocolError(f"a figure in this {kind} is not finite")


def figures(message: AnyMessage) -> dict[str, object]:
    """Return the figures of a reply that an event may show: no codes, no texts, no scores."""
    shown = {}
    for name in ("release", "round", "accuracy", "examples", "raw_bytes", "cosine", "seconds"):
        if hasattr(message, name):
            shown[name] = getattr(message, name)
    for name in ("tokens_per_s", "peak_mb"):
        if hasattr(message, name):
            shown[name] = round(getattr(message, name), 2)
    if hasattr(message, "codes"):
        shown["sent_bytes"] = len(message.codes)
    return shown


def _numbers(reply: AnyMessage) -> list[float]:
    if isinstance(reply, Scores):
        return list(reply.scores)
    if isinstance(reply, AdapterUpdate):
        return [reply.cosine, reply.peak_mb, *reply.seconds.values()]
    if isinstance(reply, ModelReport):
        return [reply.accuracy, reply.tokens_per_s, reply.peak_mb, *reply.seconds.values()]
    return []
