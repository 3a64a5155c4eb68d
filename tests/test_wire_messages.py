"""The vocabulary: every message survives its bytes, and any bytes give a message or an error."""

import contextlib
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import FleetError, LocalProtocolError, RemoteProtocolError
from edge_sdk.wire import messages
from edge_sdk.wire.messages import (
    AnyMessage,
    File,
    Score,
    Scores,
    TextTask,
    decode,
    encode,
    file_head,
)

TASK = TextTask("kind", "Request: {text}\nKind:", "{label}:", ("a", "b"), (" a", " b"))
SAMPLES = [
    messages.TrainAdapter(
        "t", 1, "chat", "r-1", b"\0", 1, 8, 16.0, ("q_proj",), "", b"", 10, 4, 1e-3, 0.5, 0, 7
    ),
    Score("t", "r-1", ("a text", ""), ("x", "y")),
    messages.OfferModel("t", "chat", "r-1", {"root.json": b"{}"}, ("chat/r-1/symbiont.json",)),
    messages.OfferModel(
        "t",
        "chat",
        "r-2",
        {},
        ("chat/r-2/symbiont.json",),
        messages.AdapterSource(
            bytes(32), (messages.AdapterDelta(bytes(32), b"codes"),), 1, 8, 16.0, ("q_proj",)
        ),
        b"packed",
    ),
    messages.OfferData("t", 3, ("text",), ("label",), (0.5,)),
    messages.AdapterUpdate("t", 1, "r-1", "codec", b"codes", 40, 4000, 0.9, {"train": 1.0}, 100.0),
    Scores("t", (0.0, 1.0)),
    messages.TopLogits("t", 1, "chat", "r-1", ("a text",), ("x",), 16),
    messages.LogitRows("t", 1, "r-1", bytes(32), 1, bytes(4), bytes(2), bytes(2), {}, 100.0),
    messages.TeachAdapter(
        "t",
        1,
        "chat",
        "r-1",
        b"\0",
        8,
        16.0,
        ("q_proj",),
        "codec",
        b"",
        10,
        4,
        1e-3,
        0,
        7,
        ("a text",),
        ("x",),
        False,
        0.9,
        False,
        bytes(32),
        b"",
        bytes(4),
        bytes(4),
        1,
        bytes(4),
        bytes(2),
        bytes(2),
    ),
    messages.WantFiles("t", ("a", "b")),
    File("t", "a", b"data"),
    messages.ModelReport("t", "r-1", 0.75, 20, 33.0, 100.0, {}),
    messages.Refused("t", "no examples"),
    messages.VerifyDraft("t", bytes(32), 0, (5, 6, 7), (8, 9), 0.7, 40, 0.9),
    messages.Verified("t", (8, 10), 1, 0.004, 0.002),
    messages.Enrol("t-1", bytes(16), "kitchen-1", bytes(32), bytes(32), ("chat",), 512),
    messages.RenewKeys("renew-1", b"statement", bytes(64), bytes(64)),
    messages.Renewed("renew-1", b"certificate"),
    messages.Enrolled("kitchen-1", b"{}", TASK),
]


def test_every_message_survives_its_bytes():
    assert {type(message) for message in SAMPLES} == set(get_args(AnyMessage))
    for message in SAMPLES:
        assert decode(encode(message)) == message


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.binary(max_size=300))
def test_any_bytes_give_a_message_or_a_fleet_error(data):
    with contextlib.suppress(FleetError):
        decode(data)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sample=st.sampled_from(SAMPLES), at=st.integers(0, 400), byte=st.integers(0, 255))
def test_any_changed_message_gives_a_message_or_a_fleet_error(sample, at, byte):
    data = bytearray(encode(sample))
    data[at % len(data)] = byte
    with contextlib.suppress(FleetError):
        decode(bytes(data))


def test_a_message_nested_without_end_is_refused():
    with pytest.raises(RemoteProtocolError):
        decode(b"\x91" * 100_000)


@pytest.mark.parametrize(
    "changed",
    [
        {"task_id": "../../etc"},
        {"task_id": ""},
        {"scores": [1.5]},
        {"scores": [float("nan")]},
        {"scores": ["1"]},
        {"more": 1},
        {"type": "Launch"},
    ],
    ids=str,
)
def test_a_field_out_of_its_range_is_refused(changed):
    fields = {"type": "Scores", "task_id": "t", "scores": [0.5]}

    assert decode(msgspec.msgpack.encode(fields)) == Scores("t", (0.5,))
    with pytest.raises(RemoteProtocolError):
        decode(msgspec.msgpack.encode(fields | changed))


def test_messages_over_the_limit_are_neither_made_nor_opened(monkeypatch):
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(LocalProtocolError, match="over the limit of 100"):
        encode(File("t", "a", bytes(100)))
    with pytest.raises(RemoteProtocolError, match="over the limit of 100"):
        decode(bytes(101))


def test_a_file_is_its_head_and_its_data() -> None:
    for size in (0, 5, 300, 70_000):
        whole = File("t", "a/b", bytes(size), offset=7, size=100_000)

        data = file_head(File("t", "a/b", b"", offset=7, size=100_000), size) + bytes(size)

        assert decode(data) == whole
