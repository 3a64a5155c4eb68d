"""An offer's metadata, packed: they come back, bombs do not, and older devices read theirs."""

import zlib
from pathlib import Path

import msgspec
import pytest

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.wire import offers
from edge_sdk.wire.messages import OfferModel, decode, encode
from edge_sdk.wire.offers import packed, unpacked
from tests.edge_world import offer, releases


def test_metadata_come_back_and_take_a_third(tmp_path: Path) -> None:
    plain = offer(releases(tmp_path), "a1")

    small = packed(plain)

    assert small.metadata == {}
    assert unpacked(decode(encode(small))) == plain  # type: ignore[arg-type]
    assert unpacked(plain) is plain
    assert 3 * len(small.packed) < sum(map(len, plain.metadata.values()))


def test_an_offer_without_the_new_fields_is_that_of_the_first_version() -> None:
    plain = OfferModel("t", "slm", "base", {"root.json": b"{}"}, ("a",))

    assert set(msgspec.msgpack.decode(encode(plain))) == {
        "type",
        "task_id",
        "family",
        "release",
        "metadata",
        "targets",
    }


def deflated(value: object) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(value))


GOOD = deflated({"root.json": b"{}"})


@pytest.mark.parametrize(
    "data",
    [
        b"no deflate",
        GOOD[:-5],
        deflated([1, 2]),
        deflated({"x" * 2000: b""}),
        deflated({str(i): b"" for i in range(1025)}),
        zlib.compress(b"\x91" * 100_000),
        zlib.compress(bytes(offers.MOST_BYTES + 1)),
    ],
)
def test_what_is_malformed_or_inflates_too_far_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="metadata are"):
        unpacked(OfferModel("t", "slm", "base", {}, ("a",), packed=data))
