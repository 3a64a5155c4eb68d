"""Tensor files from elsewhere: what the library accepts and we do not."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from compression.errors import CodecError
from compression.tensor_file import MAX_HEAD_BYTES, MAX_TENSORS, read


def blob(head: bytes | dict, body: bytes = b"") -> bytes:
    """A file with this head, whatever it says."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


EMPTY = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}


def test_tensors_and_metadata_come_back():
    tensors = {"model.layers.0.q_proj.lora_A": np.arange(6, dtype=np.float16).reshape(2, 3)}

    found, metadata = read(save(tensors, metadata={"codec": "x"}))

    assert metadata == {"codec": "x"}
    assert np.array_equal(found["model.layers.0.q_proj.lora_A"], *tensors.values())


def test_a_repeated_name_is_refused_though_the_library_takes_it():
    data = blob(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    )

    assert set(load(data)) == {"a"}
    with pytest.raises(CodecError, match="twice"):
        read(data)


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a/../b", "", "a\0b", "Ä", "x" * 257])
def test_names_that_are_no_names_are_refused(name):
    with pytest.raises(CodecError, match="name"):
        read(blob({name: EMPTY}))


def test_a_crowd_of_empty_tensors_is_refused():
    with pytest.raises(CodecError, match="over the limit"):
        read(blob({f"t{n}": EMPTY for n in range(MAX_TENSORS + 1)}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", MAX_HEAD_BYTES + 1) + bytes(MAX_HEAD_BYTES + 1),
        blob(b"[" * 100_000),
        blob(b'{"a":' * 50_000),
        blob(b"[]"),
        blob(b"null"),
        blob(b"\xff\xff"),
        blob(b'{"__metadata__":[]}'),
        blob(b'{"__metadata__":{"a":1}}'),
        blob({"a": EMPTY | {"shape": [2**40, 2**40]}}),
        blob({"a": EMPTY | {"dtype": "F99"}}),
        blob({"a": 1}),
        blob({"a": EMPTY}, b"trailing"),
        blob({"a": EMPTY | {"shape": [1], "data_offsets": [0, 2**40]}}),
    ],
)
def test_what_is_no_tensor_file_is_refused(data):
    with pytest.raises(CodecError):
        read(data)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200) | st.builds(blob, st.binary(max_size=100)))
def test_any_bytes_give_tensors_or_a_codec_error(data):
    try:
        read(data)
    except CodecError:
        return
