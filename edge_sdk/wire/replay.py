"""Which sequence numbers of one sender were seen: the highest, and a window behind it.

Knows two integers. Does not know senders, keys or where the numbers are kept.

Nothing relies on the order in which a broker delivers. A number is taken once; one that is WINDOW
or more behind the highest is refused, since nobody remembers whether it was taken.
"""

from edge_sdk.errors import RemoteProtocolError

WINDOW = 64
"""How many sequence numbers behind the highest accepted one may still arrive."""


def take(highest: int, seen: int, sequence: int) -> tuple[int, int]:
    """Return (highest, seen) after `sequence`; bit i of `seen` is the number `highest - i`.

    Numbers start at 1, (0, 0) is the state before any; 0 is never taken.

    Raises:
        RemoteProtocolError: it was taken before, or is too far behind.
    """
    ahead = sequence - highest
    if sequence < 1 or ahead <= -WINDOW or (ahead <= 0 and seen >> -ahead & 1):
        raise RemoteProtocolError(
            f"message {sequence} is a repeat or too far behind {highest}; it was not taken again"
        )
    if ahead <= 0:
        return highest, seen | 1 << -ahead
    # Python's integers grow as far as a lying peer counts ahead; look before the shift.
    seen = seen << ahead if ahead < WINDOW else 0
    return sequence, (seen | 1) & ((1 << WINDOW) - 1)
