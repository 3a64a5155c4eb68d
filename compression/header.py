"""The first bytes of an encoded update. Knows struct and limits; knows no arrays' content.

Little-endian: magic "SyC1", method (1 byte), number of kinds (1), codec id (4), layout hash (4),
bytes that follow the header (4), CRC-32 of everything but itself (4), step (2), offsets (2), top
magnitude (2), then per kind its RMS (2). The step is a float16, for the rate is steep in it. An RMS
is a bfloat16: eight bits are enough for a scale that both sides read back; its range is float32's.
The checksum finds damage and mistakes; against an adversary the message around it is sealed.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from compression.entropy import MAX_MAGNITUDE
from compression.errors import CodecError

MAGIC = b"SyC1"
"""Format and its version; a change of meaning changes the digit."""

_FIXED = struct.Struct("<4sBB4s4sIIeBBH")
_CRC_AT = 18


class Method(IntEnum):
    """What made the codes."""

    IDENTITY = 0
    DEAD_ZONE = 1
    LEARNED = 2
    MOVING = 3


@dataclass(frozen=True, slots=True)
class Header:
    """The fields above; `step` must be a float16, each `rms` a bfloat16."""

    method: Method
    codec: bytes
    layout: bytes
    rms: tuple[float, ...] = ()
    step: float = 0.0
    offsets: tuple[int, int] = (0, 0)
    top: int = 0

    def size(self) -> int:
        """Bytes of the encoded header."""
        return header_bytes(len(self.rms))

    def encode(self, body: bytes) -> bytes:
        """The header and the body that follows it."""
        fixed = _FIXED.pack(
            MAGIC, self.method, len(self.rms), self.codec, self.layout, len(body), 0,
            self.step, *self.offsets, self.top,
        )  # fmt: skip
        data = fixed + struct.pack(f"<{len(self.rms)}H", *map(_to_code, self.rms)) + body
        return data[:_CRC_AT] + struct.pack("<I", _checksum(data)) + data[_CRC_AT + 4 :]


def header_bytes(kinds: int) -> int:
    """Bytes of a header with this many kinds."""
    return _FIXED.size + 2 * kinds


def decode_header(data: bytes) -> tuple[Header, bytes]:
    """Return header and body.

    Raises:
        CodecError: not codes of this format and version, cut short, lengthened or damaged.
    """
    if len(data) < _FIXED.size or data[:4] != MAGIC:
        raise CodecError(f"{len(data)} bytes that do not begin as codes of this version")
    _, method, kinds, codec, layout, length, crc, step, low, high, top = _FIXED.unpack_from(data)
    start = header_bytes(kinds)
    if method not in tuple(Method) or len(data) != start + length:
        raise CodecError(
            f"codes of {len(data)} bytes announce {start + length}; ask for them again"
        )
    if _checksum(data) != crc:
        raise CodecError("the codes are damaged (checksum); ask for them again")
    rms = tuple(map(_from_code, struct.unpack_from(f"<{kinds}H", data, _FIXED.size)))
    header = Header(Method(method), codec, layout, rms, step, (low, high), top)
    if not all(math.isfinite(x) and x >= 0 for x in (header.step, *rms)):
        raise CodecError("a scale of the codes is negative or not finite")
    if top > MAX_MAGNITUDE:
        raise CodecError(f"magnitudes up to {top} are over the limit of {MAX_MAGNITUDE}")
    return header, data[start:]


def bfloat16(value: float) -> float:
    """The nearest bfloat16 of a number that is not negative."""
    return _from_code(_to_code(value))


def _to_code(value: float) -> int:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return int(bits + 0x8000) >> 16


def _from_code(code: int) -> float:
    (value,) = struct.unpack("<f", struct.pack("<I", code << 16))
    return float(value)


def _checksum(data: bytes) -> int:
    return zlib.crc32(data[_CRC_AT + 4 :], zlib.crc32(data[:_CRC_AT]))
