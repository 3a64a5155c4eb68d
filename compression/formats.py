"""Which formats this version reads, as words that a device says and a coordinator understands.

Knows version numbers. Does not know what the formats hold; imports nothing, so that a device that
cannot train says so cheaply.

A device says `words()` when it enrols and with each report on a model. A coordinator asks each
device for the newest codec that both know; a device that says nothing reads codec format 1 and
whole adapters, as the first version did.
"""

from collections.abc import Collection

CODEC_FORMATS = (1, 2)
"""Formats of codec files (`codec_file.py`) that are read here, oldest first."""

DELTA_FORMATS = (1,)
"""Formats of an adapter's change on its way down (`downlink.py`) that are read here."""

RELEASE_FORMATS = (1,)
"""Formats of an offer from which a released adapter is made here: `AdapterSource`, packed."""

_CODEC, _DELTA, _RELEASE = "codec.", "delta.", "release."


def words() -> tuple[str, ...]:
    """What this version reads, for example ("codec.1", "delta.1", "release.1")."""
    known = ((_CODEC, CODEC_FORMATS), (_DELTA, DELTA_FORMATS), (_RELEASE, RELEASE_FORMATS))
    return tuple(f"{prefix}{number}" for prefix, numbers in known for number in numbers)


def codec_formats(said: Collection[str]) -> frozenset[int]:
    """The codec formats in a device's words; {1} where it names none. Unknown words are skipped."""
    return _numbers(said, _CODEC) or frozenset({1})


def reads_deltas(said: Collection[str]) -> bool:
    """Whether a device takes an adapter as its difference from one that it holds."""
    return bool(_numbers(said, _DELTA) & frozenset(DELTA_FORMATS))


def makes_releases(said: Collection[str]) -> bool:
    """Whether a device makes a released adapter's file from its difference to one that it holds."""
    return bool(_numbers(said, _RELEASE) & frozenset(RELEASE_FORMATS))


def _numbers(said: Collection[str], prefix: str) -> frozenset[int]:
    found = (word.removeprefix(prefix) for word in said if word.startswith(prefix))
    return frozenset(int(number) for number in found if number.isascii() and number.isdigit())
