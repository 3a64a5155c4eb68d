"""What this installation reads of what a coordinator may send. Knows which packages are here.

Does not load them: a device says this when it enrols, long before it trains.
"""

from importlib.util import find_spec

from compression import formats


def reads() -> tuple[str, ...]:
    """Words of `compression.formats`; none where the range coder is not installed."""
    return formats.words() if find_spec("constriction") else ()
