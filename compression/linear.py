"""Codes that add up: for secure aggregation, where only the sum of all devices' codes is seen.

Knows a shared linear encoder, one step for all, and integers in a ring. Does not know masks, keys
or who sums; `examples` and the trust work add those.

The encoder is a matrix with orthonormal columns per kind of factor (`basis.py`), the same for every
device, and so is the step. A latent is rounded to an integer q = round(z / step), clipped to
|q| <= limit, and sent in the ring Z / 2^bits:

    limit = (2^(bits - 1) - 1) // devices

so that the sum of `devices` integers cannot wrap. Masks drawn uniformly from the ring hide every
single code perfectly, and cancel in the sum; decoding is linear, hence

    decode(sum_k q_k) = sum_k decode(q_k)        exactly, up to the clip and the rounding of each

Masked codes are uniform, so no entropy coder can shorten them: `bits` per latent is the price, and
the saving is that of the width (latents per block) and of the ring. What rounding and clipping
leave out is the device's own to know, and error feedback carries it as always.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compression.basis import Basis
from compression.blocks import Layout, Tensors
from compression.errors import CodecError
from compression.feedback import FeedbackState, norm_of

U32 = npt.NDArray[np.uint32]

RING_BITS = range(2, 33)


@dataclass(frozen=True)
class LinearCodes:
    """One round's common agreement: encoder, step, ring and number of devices.

    Attributes:
        step: of the quantizer, in units of the update itself, above 0; agreed on beforehand, for
            example from the RMS of the last global update.
        bits: of the ring, 2 to 32; its elements are uint32 below 2^bits.
        devices: most devices whose codes are summed.

    Raises:
        CodecError: a step that is not above 0, a ring too small for the devices, or a basis of
            another layout.
    """

    layout: Layout
    basis: Basis
    step: float
    bits: int
    devices: int

    def __post_init__(self) -> None:
        if not (np.isfinite(self.step) and self.step > 0):
            raise CodecError(f"step {self.step} must be above 0")
        if self.bits not in RING_BITS or self.devices < 1 or self.limit < 1:
            raise CodecError(
                f"a ring of {self.bits} bits leaves no integer for each of {self.devices} "
                f"devices; take more bits (at most {RING_BITS[-1]}) or fewer devices"
            )
        if set(self.basis.stored) != set(self.layout.kinds):
            raise CodecError("the basis was learned for other kinds of factors")

    @property
    def limit(self) -> int:
        """Largest |q| of one device."""
        return int((2 ** (self.bits - 1) - 1) // self.devices)

    @property
    def size(self) -> int:
        """Integers of one code."""
        return self.layout.rows * self.basis.width

    @property
    def bytes_sent(self) -> int:
        """Bytes of one packed code, masked or not."""
        return -(-self.size * self.bits // 8)

    def encode(self, update: Tensors, state: FeedbackState) -> U32:
        """Ring elements (size,) of an update; `state` gives and receives the error feedback.

        Raises:
            CodecError: other tensors than the layout's, or values that are not finite.
        """
        packed = self.layout.pack(update)  # (rows, block)
        step = norm_of(packed)
        wanted = state.add_to(packed, self.layout)
        if not np.isfinite(wanted).all():
            raise CodecError("the update holds values that are not finite")
        latents = self.basis.encode(wanted, self.layout)
        q = np.clip(np.rint(latents.reshape(-1) / self.step), -self.limit, self.limit)
        state.keep((wanted - self._blocks(q)).astype(np.float32), self.layout, step)
        return self.reduced(q.astype(np.int64))

    def reduced(self, values: npt.NDArray[np.integer]) -> U32:
        """Integers as elements of the ring."""
        return np.asarray(values.astype(np.int64) & (2**self.bits - 1), np.uint32)

    def decode_sum(self, total: U32) -> dict[str, npt.NDArray[np.float32]]:
        """The sum of all devices' updates, from the sum of their codes in the ring (size,).

        Raises:
            CodecError: not `size` elements of the ring.
        """
        if total.shape != (self.size,) or int(total.max(initial=0)) >= 2**self.bits:
            raise CodecError(
                f"{total.size} integers are no sum of codes: {self.size} below 2^{self.bits} are"
            )
        q = total.astype(np.int64)
        q = np.where(q >= 2 ** (self.bits - 1), q - 2**self.bits, q)
        return self.layout.unpack(self._blocks(q).astype(np.float32))

    def pack(self, codes: U32) -> bytes:
        """Ring elements in `bits` bits each."""
        shifts = np.arange(self.bits, dtype=np.uint32)
        return np.packbits((codes[:, None] >> shifts) & 1, bitorder="little").tobytes()

    def unpack(self, data: bytes) -> U32:
        """What `pack` wrote.

        Raises:
            CodecError: other than `bytes_sent` bytes.
        """
        if len(data) != self.bytes_sent:
            raise CodecError(f"{len(data)} bytes are no code of {self.bytes_sent}")
        flat = np.unpackbits(
            np.frombuffer(data, np.uint8), bitorder="little", count=self.size * self.bits
        )
        powers = np.uint64(1) << np.arange(self.bits, dtype=np.uint64)
        return np.asarray(flat.reshape(-1, self.bits) @ powers, np.uint32)

    def _blocks(self, q: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        latents = (q.astype(np.float64) * self.step).reshape(self.layout.rows, self.basis.width)
        blocks = np.empty((self.layout.rows, self.layout.block))
        for kind, rows in self.layout.kind_rows.items():
            blocks[rows] = latents[rows] @ self.basis.encoders[kind].T.astype(np.float64)
        return blocks
