"""The update codec: an adapter's change in, few bytes out, and back. Knows numpy and constriction.

Does not know torch, messages, rounds or who learns when. Four kinds of codec share one class:
identity (float32, bit-exact), dead-zone (nothing learned: for the first round and as a fallback),
learned (a linear autoencoder per kind of factor, sent as a file) and moving (an eigenbasis that
both sides derive from the adapter's last changes), all before the same quantizer and range coder.

Encoding goes: add what error feedback still owes, code the sum (`coder.py`), keep the remainder.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compression import codec_file
from compression.basis import Basis, learn
from compression.blocks import F32, Layout, Tensors
from compression.coder import Coder, Draft
from compression.errors import CodecError, TooFewBytes
from compression.feedback import FeedbackState, norm_of
from compression.header import Header, Method, decode_header, header_bytes
from compression.moving import WINDOW, MovingBasis, moves
from compression.transforms import EncoderSession

__all__ = ["Compressor", "Encoded", "EncoderSession", "FeedbackState", "Layout", "Method"]

RATIO = 50.0
"""Times fewer bytes than float32 when no byte target is given; README.md says what it costs."""

LEAST_BYTES = 256
"""Without a byte target, a small adapter gets this much even where the ratio says less."""


@dataclass(frozen=True)
class Encoded:
    """An encoded update.

    data: what is sent. cosine: of `decoded` against the update plus what error feedback owed, in
    [-1, 1]. method: "identity", "dead-zone", "learned" or "moving". blocks: what the coordinator
    will read, float32 (rows, block) of `layout`.
    """

    data: bytes
    cosine: float
    method: str
    blocks: F32 = field(repr=False)
    layout: Layout = field(repr=False)

    @cached_property
    def decoded(self) -> dict[str, F32]:
        """What the coordinator will read, float32 by tensor name."""
        return self.layout.unpack(self.blocks)


class Compressor:
    """An immutable codec for one layout of tensors; `codec_id` names its exact content."""

    def __init__(
        self,
        layout: Layout,
        method: Method,
        *,
        basis: Basis | MovingBasis | None = None,
        ratio: float = RATIO,
        changes: tuple[bytes, ...] = (),
    ) -> None:
        if _BASES.get(method, type(None)) is not type(basis):
            raise CodecError("a learned or moving codec needs its basis, any other has none")
        if not 1.0 <= ratio <= 1e6:
            raise CodecError(f"ratio {ratio} is not in 1..1000000")
        self.layout, self.method, self.basis, self.ratio = layout, method, basis, float(ratio)
        self.changes = changes

    # --- making one ---------------------------------------------------------------------------

    @classmethod
    def identity(cls, layout: Layout) -> "Compressor":
        """float32 as it is, bit for bit."""
        return cls(layout, Method.IDENTITY)

    @classmethod
    def deadzone(cls, layout: Layout, *, ratio: float = RATIO) -> "Compressor":
        """The plain dead-zone quantizer with range coding: nothing to learn, nothing to send."""
        return cls(layout, Method.DEAD_ZONE, ratio=ratio)

    @classmethod
    def fit(
        cls,
        updates: Iterable[Tensors],
        *,
        layout: Layout | None = None,
        width: int | None = None,
        ratio: float = RATIO,
        encoders: Mapping[str, npt.NDArray[np.floating]] | None = None,
    ) -> "Compressor":
        """Learn a codec from earlier (decoded) updates, all of one layout.

        `width` latents per block (default: all, so that nothing is out of reach and the quantizer
        decides); `encoders` replaces PCA's, kind -> (block, width) with orthonormal columns.

        Raises:
            CodecError: nothing to learn from, or updates of different layouts.
        """
        updates = list(updates)
        if not updates:
            raise CodecError("a codec needs at least one update to learn from")
        layout = layout or Layout.of(updates[0])
        basis = learn(updates, layout, width=width or layout.block, encoders=encoders)
        return cls(layout, Method.LEARNED, basis=basis, ratio=ratio)

    @classmethod
    def moving(
        cls, changes: Sequence[bytes], *, layout: Layout, ratio: float = RATIO
    ) -> "Compressor":
        """The codec that follows from the common adapter's last changes, oldest first.

        `changes` are codes of the plain or the identity codec, as `downlink.py` sends them; of more
        than `moving.WINDOW` the last count. All who were sent the same make the same codec, with
        the same `codec_id`, and nothing is sent for it.

        Raises:
            CodecError: no changes, none that is not zero, or codes that are malformed.
        """
        read = [(codes, cls._change(codes, layout)) for codes in changes[-WINDOW:]]
        return cls._moving(read, layout, ratio)

    def followed(self, changes: Sequence[bytes]) -> "Compressor":
        """The moving codec that this one becomes after `changes`, of which empty ones do not count.

        Raises:
            CodecError: codes that are malformed.
        """
        read = [(codes, self._change(codes, self.layout)) for codes in changes]
        said = [(codes, change) for codes, change in read if moves(change)]
        if not said:
            return self
        held = self.basis.changes if isinstance(self.basis, MovingBasis) else ()
        before = zip(self.changes, held, strict=True)
        return self._moving([*before, *said][-WINDOW:], self.layout, self.ratio)

    def followed_to(self, codec_id: str, changes: Sequence[bytes]) -> "Compressor":
        """This codec, or the one named `codec_id` that it becomes after the last of `changes`.

        It may have followed the first of them before, so each beginning is tried.

        Raises:
            CodecError: a change is malformed, or none of the beginnings leads there.
        """
        if self.codec_id == codec_id:
            return self
        for start in range(len(changes)):
            found = self.followed(changes[start:])
            if found.codec_id == codec_id:
                return found
        raise CodecError(f"codec {codec_id} is not what {self.codec_id} becomes; ask for it")

    # --- encode and decode --------------------------------------------------------------------

    def encode(
        self,
        update: Tensors,
        state: FeedbackState | None = None,
        bytes_target: int = 0,
        *,
        session: EncoderSession | None = None,
    ) -> Encoded:
        """Encode an update; `state` gives and receives the error feedback.

        `bytes_target` is the allowance for `Encoded.data` (0: the codec's `ratio`). `session` runs
        the graph of `encoder_onnx`; without it numpy does the same. An error leaves `state` alone.

        Raises:
            TooFewBytes: a target below what the headers alone take.
            CodecError: other tensors than the layout's, or values that are not finite.
        """
        state = state if state is not None else FeedbackState()
        packed = self.layout.pack(update)
        step = norm_of(packed)
        wanted = state.add_to(packed, self.layout)
        if self.method is Method.IDENTITY:
            draft = self._identity_draft(wanted)
        else:
            draft = self._coder.encode(wanted, bytes_target or self._allowance, session)
        if bytes_target and len(draft.data) > bytes_target:
            raise TooFewBytes(
                f"a target of {bytes_target} bytes is too low: {len(draft.data)} are the least"
            )
        if self.method is not Method.IDENTITY or not state.empty:
            wanted -= draft.sent
            state.keep(wanted, self.layout, step)
        name = _METHOD_NAMES[draft.method]
        return Encoded(draft.data, draft.cosine, name, draft.sent, self.layout)

    def decode(self, data: bytes) -> dict[str, F32]:
        """The update that codes stand for, float32 by tensor name.

        Raises:
            CodecError: malformed, truncated, oversized, damaged, or made by another codec.
        """
        if len(data) > self.max_bytes:
            raise CodecError(
                f"codes of {len(data)} bytes; this layout's are at most {self.max_bytes}"
            )
        header, body = decode_header(data)
        if header.layout != self.layout.hash[:4] or header.codec != self._short_id:
            raise CodecError("the codes were made by another codec or for another adapter")
        if header.method is Method.IDENTITY and self.method is Method.IDENTITY:
            return self._decode_identity(body)
        allowed = {Method.DEAD_ZONE, self.method} - {Method.IDENTITY}
        if self.method is Method.IDENTITY or header.method not in allowed:
            raise CodecError(f"this codec does not read codes of method {header.method.name}")
        return self.layout.unpack(self._coder.decode(header, body))

    # --- identity and files -------------------------------------------------------------------

    @property
    def format(self) -> int:
        """Of its file and codes; one of `compression.formats.CODEC_FORMATS`."""
        return codec_file.format_of(self.method)

    @staticmethod
    def method_of(data: bytes) -> str:
        """What made the codes, by their header: "identity", "dead-zone", "learned" or "moving".

        Raises:
            CodecError: the header is damaged.
        """
        return _METHOD_NAMES[decode_header(data)[0].method]

    @property
    def max_bytes(self) -> int:
        """No code of this layout is longer; checked before anything is allocated."""
        return header_bytes(len(self.layout.kinds)) + 64 + 4 * self.layout.rows * self.layout.block

    @property
    def raw_bytes(self) -> int:
        """Bytes of the update as float32, for ratios."""
        return 4 * self.layout.values

    @cached_property
    def codec_id(self) -> str:
        """SHA-256 over the codec's file, 32 hexadecimal digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """The codec as one safetensors blob; a moving one as the changes that it follows from."""
        basis = self.basis if isinstance(self.basis, Basis) else None
        return codec_file.dump(self.layout, self.method, self.ratio, basis, self.changes)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Compressor":
        """The codec that `to_bytes` wrote.

        Raises:
            CodecError: not a codec file of this format.
        """
        layout, method, ratio, basis, changes = codec_file.parse(data)
        if method not in tuple(Method):
            raise CodecError(f"codec method {method} is not known")
        if method == Method.MOVING:
            return cls.moving(changes, layout=layout, ratio=ratio)
        return cls(layout, Method(method), basis=basis, ratio=ratio)

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write `codec.safetensors` into the folder (made if missing); return the file's path."""
        path = Path(folder) / codec_file.FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.to_bytes())
        return path

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "Compressor":
        """Read what `save_pretrained` wrote.

        Raises:
            CodecError: no codec file there, or not one of this format.
        """
        path = Path(folder) / codec_file.FILE_NAME
        try:
            return cls.from_bytes(path.read_bytes())
        except OSError as exc:
            raise CodecError(f"{path}: cannot be read ({exc})") from exc

    def encoder_onnx(self) -> bytes:
        """The learned encoder as ONNX: "blocks" float32 (rows, block) -> "latents" (rows, width).

        Blocks are those of `Layout.pack`, already divided by the RMS of their kind. Needs `onnx`.

        Raises:
            CodecError: nothing was learned.
        """
        if not isinstance(self.basis, Basis):
            raise CodecError("only a learned codec has an encoder to export")
        return codec_file.encoder_graph(self.layout, self.basis)

    # --- below: private -----------------------------------------------------------------------

    @cached_property
    def _short_id(self) -> bytes:
        return bytes.fromhex(self.codec_id[:8])

    @cached_property
    def _coder(self) -> Coder:
        return Coder(self.layout, self.basis, self._short_id)

    @property
    def _allowance(self) -> int:
        return max(int(self.raw_bytes / self.ratio), LEAST_BYTES)

    @classmethod
    def _moving(
        cls, read: Sequence[tuple[bytes, Tensors]], layout: Layout, ratio: float
    ) -> "Compressor":
        basis = MovingBasis(layout, tuple(change for _, change in read))
        codes = tuple(codes for codes, _ in read)
        return cls(layout, Method.MOVING, basis=basis, ratio=ratio, changes=codes)

    @classmethod
    def _change(cls, codes: bytes, layout: Layout) -> dict[str, F32]:
        # Only what is decoded one value at a time is the same on every machine.
        whole = decode_header(codes)[0].method is Method.IDENTITY
        return (cls.identity(layout) if whole else cls.deadzone(layout)).decode(codes)

    def _identity_draft(self, wanted: F32) -> Draft:
        parts = self.layout.unpack(wanted).values()
        body = b"".join(value.astype("<f4").tobytes() for value in parts)
        header = Header(Method.IDENTITY, self._short_id, self.layout.hash[:4])
        return Draft(header.encode(body), Method.IDENTITY, wanted.copy(), 1.0)

    def _decode_identity(self, body: bytes) -> dict[str, F32]:
        if len(body) != self.raw_bytes:
            raise CodecError(f"{len(body)} bytes of values, the layout has {self.raw_bytes}")
        values = np.frombuffer(body, "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise CodecError("the update holds values that are not finite")
        sizes = [math.prod(shape) for shape in self.layout.shapes]
        pieces = np.split(values, np.cumsum(sizes)[:-1])
        named = zip(self.layout.names, self.layout.shapes, pieces, strict=True)
        return {name: piece.reshape(shape) for name, shape, piece in named}


_METHOD_NAMES = {
    Method.IDENTITY: "identity",
    Method.DEAD_ZONE: "dead-zone",
    Method.LEARNED: "learned",
    Method.MOVING: "moving",
}

_BASES = {Method.LEARNED: Basis, Method.MOVING: MovingBasis}
