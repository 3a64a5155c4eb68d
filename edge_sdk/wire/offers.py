"""An offer's metadata, deflated: signed JSON full of repeated names shrinks to a third or less.

Knows OfferModel and zlib. Does not know what the metadata say, nor who reads them packed.
"""

import zlib
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.wire.messages import FilePath, OfferModel

MOST_BYTES = 16 * 2**20
"""Metadata that inflate to more are refused; ten thousand releases are 6 MB."""

_decoder = msgspec.msgpack.Decoder(Annotated[dict[FilePath, bytes], Meta(max_length=1024)])


def packed(offer: OfferModel) -> OfferModel:
    """Return the offer with its metadata packed."""
    data = zlib.compress(msgspec.msgpack.encode(offer.metadata), 9)
    return msgspec.structs.replace(offer, metadata={}, packed=data)


def unpacked(offer: OfferModel) -> OfferModel:
    """Return the offer with its metadata by name, packed or not.

    Raises:
        RemoteProtocolError: what is packed is malformed, cut short, or over MOST_BYTES.
    """
    if not offer.packed:
        return offer
    inflating = zlib.decompressobj()
    try:
        data = inflating.decompress(offer.packed, MOST_BYTES)
        if not inflating.eof:
            raise RemoteProtocolError(
                f"an offer's metadata are cut short, or over the limit of {MOST_BYTES} bytes"
            )
        metadata = _decoder.decode(data)
    except (zlib.error, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"an offer's metadata are malformed: {exc}") from exc
    return msgspec.structs.replace(offer, metadata=metadata, packed=b"")
