"""What handling one message leaves behind: replies to send and things to remember.

Knows the names under which a device remembers things between tasks. Does not know any task.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edge_sdk.wire.messages import AnyMessage

OFFER, SYNTHETIC, FEEDBACK, CODEC, OWN = "offer", "synthetic", "feedback", "codec", "own"
ADAPTERS, WORDS, RELEASED = "adapters", "words", "released"
"""Names under which the device remembers things between tasks."""

Recall = Callable[[str], bytes]
"""Returns what was remembered under a name, b"" for nothing."""

Event = Callable[[dict[str, object]], None]
"""Told what happens, in plain values without any text of an example."""


@dataclass(frozen=True, slots=True)
class Handled:
    """Replies to send and values to remember (b"" forgets), to be kept together or not at all."""

    replies: tuple[AnyMessage, ...] = ()
    remember: Mapping[str, bytes] = field(default_factory=dict)
