"""Which reply belongs to which task, and what in a reply can be checked without any model.

Knows the vocabulary's pairs. Does not know who answered, nor what the figures are for.

An update passes these steps, cheap before dear (PROTOCOL.md 4.2); each raises one typed error, and
what only a hostile or broken device sends is counted against it (`quarantine.py`):

1. size by kind, known and active device, signature, expiry, chunk hashes: the courier, before a
   byte is kept (`MOST_BYTES`; edge_sdk/link/receiving.py);
2. decryption, decoding, fields within the ranges of the vocabulary: the courier;
3. replay window and one message per task: the mailbox, in the accepting transaction;
4. an open task of this very device, of the kind, round, release and length asked, all figures
   finite and within reason: here;
5. codes decoded within the length that the codec's layout allows, names and shapes as the task's,
   finite, within the absolute bound: the program's own check (`AdapterExchange.check`);
6. not out of proportion to the round's other updates: `aggregate.py`;
7. what came out is not worse than before: `gate.py`.
"""

import math
from typing import Self

import msgspec
from msgspec import Struct

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.wire.messages import (
    AdapterUpdate,
    AnyMessage,
    LogitRows,
    ModelReport,
    OfferModel,
    Score,
    Scores,
    TeachAdapter,
    TopLogits,
    TrainAdapter,
)

MOST_BYTES = {
    "AdapterUpdate": 256 * 1024**2,
    "Scores": 8 * 1024**2,
    "LogitRows": 256 * 1024**2,
    "WantFiles": 1024**2,
    "Refused": 256 * 1024,
}
"""Most bytes of each kind that devices send; 64 KiB for the others."""
MOST_FIGURE = 1e9
"""No honest duration, speed or memory is above this."""
MOST_STAGES = 32
"""A reply times at most this many stages, each named in at most STAGE_CHARS."""
STAGE_CHARS = 32

EXPECTED = {
    "TrainAdapter": "AdapterUpdate",
    "Score": "Scores",
    "TopLogits": "LogitRows",
    "TeachAdapter": "AdapterUpdate",
    "OfferModel": "ModelReport",
}
"""The reply to each task; a task not named here has none."""


_OF_A_ROUND = (TrainAdapter, TopLogits, TeachAdapter)
_RELEASED = (*_OF_A_ROUND, OfferModel)


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
            release=task.release if isinstance(task, _RELEASED) else None,
            round=task.round if isinstance(task, _OF_A_ROUND) else None,
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
        RemoteProtocolError: of the wrong type, release, round or length, or a figure that is not
            finite or makes no sense.
    """
    kind = type(reply).__name__
    if kind != expected.kind:
        raise RemoteProtocolError(f"a {kind} where {expected.kind or 'nothing'} was asked")
    told = (AdapterUpdate, ModelReport, LogitRows)
    if isinstance(reply, told) and reply.release != expected.release:
        raise RemoteProtocolError(f"about release {reply.release}, asked was {expected.release}")
    if isinstance(reply, AdapterUpdate | LogitRows) and reply.round != expected.round:
        raise RemoteProtocolError(f"of round {reply.round}, asked was round {expected.round}")
    if isinstance(reply, Scores) and len(reply.scores) != expected.count:
        raise RemoteProtocolError(f"{len(reply.scores)} scores for {expected.count} texts")
    if not all(math.isfinite(number) for number in _numbers(reply)):
        raise RemoteProtocolError(f"a figure in this {kind} is not finite")
    stages = getattr(reply, "seconds", {})
    if len(stages) > MOST_STAGES or any(len(name) > STAGE_CHARS for name in stages):
        raise RemoteProtocolError(f"{len(stages)} stages in this {kind}, or names too long")
    # A cosine may be negative; durations, speeds and memory may not.
    measured = [*stages.values(), *(getattr(reply, n, 0.0) for n in ("peak_mb", "tokens_per_s"))]
    if not all(0.0 <= number <= MOST_FIGURE for number in measured):
        raise RemoteProtocolError(f"a figure in this {kind} is outside 0 to {MOST_FIGURE:.0e}")


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
    if isinstance(message, LogitRows):
        shown["sent_bytes"] = len(message.truth) + len(message.ids) + len(message.logps)
    return shown


def _numbers(reply: AnyMessage) -> list[float]:
    if isinstance(reply, Scores):
        return list(reply.scores)
    if isinstance(reply, AdapterUpdate):
        return [reply.cosine, reply.peak_mb, *reply.seconds.values()]
    if isinstance(reply, LogitRows):
        return [reply.peak_mb, *reply.seconds.values()]
    if isinstance(reply, ModelReport):
        return [reply.accuracy, reply.tokens_per_s, reply.peak_mb, *reply.seconds.values()]
    return []
