"""The release manifest: survives its bytes; any bytes give a manifest or an error."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import FleetError, RemoteProtocolError
from edge_sdk.wire.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    ReleaseManifest,
    decode_manifest,
    encode_manifest,
)

MANIFEST = ReleaseManifest(
    family="chat",
    release="r-1",
    kind="decoder",
    base_model="tiny",
    architecture="LlamaForCausalLM",
    context=512,
    tokenizer_sha256="0" * 64,
    files={"model.onnx": FileEntry("1" * 64, 1000)},
    adapter_slots={"model.layers.0.self_attn.q_proj": (64, 64)},
    rank_max=8,
    parity={"max_logit": 0.01},
    lineage={"base": "tiny"},
)


def test_a_manifest_survives_its_bytes():
    assert decode_manifest(encode_manifest(MANIFEST)) == MANIFEST


@settings(max_examples=300, deadline=None, derandomize=True)
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_any_changed_manifest_gives_a_manifest_or_a_fleet_error(at, byte):
    data = bytearray(encode_manifest(MANIFEST))
    data[at % len(data)] = byte
    with contextlib.suppress(FleetError):
        decode_manifest(bytes(data))


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"\xff", b"[" * 100_000, bytes(MAX_MANIFEST_BYTES + 1)],
    ids=["empty", "no-fields", "not-utf8", "nested", "endless"],
)
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(RemoteProtocolError):
        decode_manifest(data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"r-1"', b'"../r-1"'),
        (b'"decoder"', b'"program"'),
        (b'"context"', b'"kontext"'),
        (b"1000", b"-1"),
        (b"0" * 64, b"0" * 63),
    ],
)
def test_a_field_out_of_its_range_is_refused(old, new):
    data = encode_manifest(MANIFEST)
    assert old in data
    with pytest.raises(RemoteProtocolError):
        decode_manifest(data.replace(old, new, 1))
