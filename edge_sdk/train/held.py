"""The last few adapters that the coordinator sent, and the one a task begins with.

Knows digests, whole adapters, seeds and coded differences. Does not know training or storage: the
caller keeps `to_bytes()` in the transaction that ends the task, so a kill before leaves what was.

Several are kept because the coordinator knows of the newest only when a reply has arrived, and
because a round may be taken back.
"""

import logging
from collections.abc import Iterable

import msgspec

from compression import downlink
from compression.downlink import Link, digest_of
from compression.errors import CodecError
from edge_sdk.errors import Lacking, RemoteProtocolError
from edge_sdk.train.lora import Factors, Layout, from_bytes, start_factors, to_bytes
from edge_sdk.wire.messages import AdapterDelta, AdapterSource, TrainAdapter

logger = logging.getLogger(__name__)

MOST_HELD = 3
"""The newest, the one before it, and one that was taken back in between."""

_decoder = msgspec.msgpack.Decoder(list[tuple[bytes, bytes]])
_source = msgspec.msgpack.Decoder(AdapterSource)


def completed(order: TrainAdapter, released: bytes) -> TrainAdapter:
    """Return the order with the differences that came with a release, where it leaves them out.

    `released` is the encoded AdapterSource of the last one, b"" for none.
    """
    if not order.digest or order.adapter or order.deltas or not released:
        return order
    try:
        source = _source.decode(released)
    except msgspec.DecodeError as exc:
        logger.warning("the differences kept here are lost: %s", exc)
        return order
    fits = source.digest == order.digest
    return msgspec.structs.replace(order, deltas=source.deltas) if fits else order


class HeldAdapters:
    """Adapters by digest, the newest last."""

    def __init__(self, blobs: dict[bytes, bytes] | None = None) -> None:
        self._blobs = blobs or {}

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Of those held, the newest last."""
        return tuple(self._blobs)

    def begin(self, order: TrainAdapter, layout: Layout) -> TrainAdapter:
        """Return the order with its whole adapter in it, and hold that; `layout` is the codec's.

        An order without a digest (of a coordinator that sends whole adapters) stays as it is.

        Raises:
            Lacking: the adapter is not here and cannot be made from what is; nothing was changed.
        """
        if not order.digest:
            return order
        found = self._found(order, layout)
        blob = to_bytes(found)
        self._blobs.pop(order.digest, None)
        self._blobs[order.digest] = blob
        for old in list(self._blobs)[:-MOST_HELD]:
            del self._blobs[old]
        return msgspec.structs.replace(order, adapter=blob, deltas=())

    def _found(self, order: TrainAdapter, layout: Layout) -> Factors:
        digest = order.digest
        try:
            if order.adapter:
                whole = from_bytes(order.adapter)
                if digest_of(whole) != digest:
                    raise Lacking("the adapter sent is not the one its digest names", "adapter")
                return whole
            found = self.reach(digest, order.deltas, start_factors(layout, order.adapter_seed))
        except (CodecError, RemoteProtocolError) as exc:
            raise Lacking(f"the adapter cannot be read ({exc}); send it whole", "adapter") from exc
        if found is None:
            raise Lacking("this device does not hold what the adapter differs from", "adapter")
        return found

    def reach(
        self, digest: bytes, deltas: Iterable[AdapterDelta], drawn: Factors
    ) -> Factors | None:
        """The adapter of `digest`, by `deltas` from one held here or from the `drawn` one.

        None if they start from neither.

        Raises:
            CodecError: the deltas are malformed, or lead elsewhere than their digests say.
            RemoteProtocolError: an adapter held here is damaged.
        """
        known = {name: from_bytes(blob) for name, blob in self._blobs.items()}
        links = [Link(delta.base, delta.codes) for delta in deltas]
        found = downlink.reached(digest, links, {digest_of(drawn): drawn} | known)
        return None if found is None else dict(found)

    def to_bytes(self) -> bytes:
        """All of them; b"" for none."""
        return msgspec.msgpack.encode(list(self._blobs.items())) if self._blobs else b""

    @classmethod
    def from_bytes(cls, data: bytes) -> "HeldAdapters":
        """What `to_bytes` wrote; none where it cannot be read, for the coordinator has them all."""
        try:
            return cls(dict(_decoder.decode(data)) if data else {})
        except msgspec.DecodeError as exc:
            logger.warning("the adapters held here are lost and will be asked for: %s", exc)
            return cls()
