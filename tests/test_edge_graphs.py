"""Graphs are judged by a bounded walk before any parser in C++ sees them."""

import json
import random
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from edge_sdk.errors import TrustError
from edge_sdk.graphs import (
    OPERATORS,
    Limits,
    check_bundle,
    check_files,
    check_graph,
)
from edge_sdk.plain_files import open_plain
from tests.edge_world import releases
from tests.torture.b5_hostile_onnx import DATA_FILE, WEIGHTS, model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases(tmp_path_factory.mktemp("graphs")).folder / "targets" / "tiny" / "r1"


def test_an_exported_bundle_passes_and_its_weights_are_found(bundle: Path) -> None:
    check_bundle(bundle)

    found = check_graph(bundle / "model.onnx", check_files(bundle))

    assert found.opsets == {"": 22, "com.microsoft": 1}
    assert {place["location"] for place in found.outside} == {DATA_FILE}
    assert "com.microsoft:MatMulNBits" in found.operators


def test_an_operator_is_allowed_by_the_operator(bundle: Path) -> None:
    odd = model(op=("ai.own", "Mine"))

    with pytest.raises(TrustError, match=r"'ai\.own:Mine', which is not on this device's list"):
        check_graph(odd)
    check_graph(odd, operators=OPERATORS | {"ai.own:Mine"})
    with pytest.raises(TrustError, match="MatMul"):
        check_graph(model(), operators=frozenset({"Add"}))


def test_a_function_is_as_good_as_its_body() -> None:
    def with_body(op: str, domain: str = "ai.local") -> bytes:
        body = helper.make_function(
            domain,
            "F",
            ["a"],
            ["b"],
            [helper.make_node(op, ["a"], ["b"])],
            [helper.make_opsetid("", 21)],
        )
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        node = helper.make_node("F", ["x"], ["y"], domain=domain)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain or "ai.local", 1)]
        graph = helper.make_graph([node], "g", [value], [out])
        return helper.make_model(graph, functions=[body], opset_imports=opsets).SerializeToString()

    check_graph(with_body("Relu"))
    with pytest.raises(TrustError, match="'NonZero'"):
        check_graph(with_body("NonZero"))
    with pytest.raises(TrustError, match="standard operator 'F' anew"):
        check_graph(with_body("Relu", ""))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "0 bytes"),
        (b"\x08\x08", "0 graphs"),
        (b"\x3a\x00\x3a\x00", "2 graphs"),
        (b"\x3a\x05\x12\x01g", "cut off"),
        (b"\x3a\x03\x13\x01g", "not protobuf"),
        (b"\xff" * 20, "cut off"),
        (b"\x3a\x00\xa2\x01\x00", "training graph"),
        (b"\x3a\x08\x0a\x06\x22\x01A\x22\x01B", "names its operator twice"),
        (b"\x3a\x00\x42\x02\x10\x15\x42\x02\x10\x16", "two versions of operator set"),
        (b"\x3a\x0e\x2a\x0c\x08\xff\xff\xff\xff\x0f\x08\xff\xff\xff\xff\x0f", "elements"),
    ],
)
def test_what_is_no_sound_model_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(TrustError, match=sentence):
        check_graph(data)


def test_depth_and_number_are_bounded() -> None:
    def wrap(inner: bytes) -> bytes:
        # a graph whose node's attribute holds a graph: node.attribute.g
        def field(number: int, data: bytes) -> bytes:
            length = len(data)
            head = bytes([number << 3 | 2])
            while length > 127:
                head += bytes([length & 127 | 128])
                length >>= 7
            return head + bytes([length]) + data

        return field(1, field(5, field(6, inner)) + field(4, b"If"))

    graph = b""
    for _ in range(2000):
        graph = wrap(graph)
    data = b"\x3a" + _varint(len(graph)) + graph
    with pytest.raises(TrustError, match="nested deeper than 8"):
        check_graph(data)
    with pytest.raises(TrustError, match="more than 0 nodes"):
        check_graph(model(), limits=Limits(nodes=0))
    with pytest.raises(TrustError, match="allowed: 1 to 10"):
        check_graph(model(), limits=Limits(graph=10))


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def test_changed_bytes_give_the_typed_error_or_pass(bundle: Path) -> None:
    data = (bundle / "model.onnx").read_bytes()
    sizes = check_files(bundle)
    rng = random.Random(7)
    refused = 0
    for _ in range(600):
        bent = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            bent[rng.randrange(len(bent))] = rng.randrange(256)
        try:
            check_graph(bytes(bent[: rng.choice((len(bent), rng.randrange(len(bent))))]), sizes)
        except TrustError:
            refused += 1

    assert refused > 300


def test_a_folder_holds_plain_files_only(tmp_path: Path) -> None:
    import os

    (tmp_path / DATA_FILE).write_bytes(WEIGHTS)
    assert check_files(tmp_path) == {DATA_FILE: 64}

    for name, make in (
        ("link", lambda path: path.symlink_to(tmp_path / DATA_FILE)),
        ("pipe", os.mkfifo),
        ("folder", Path.mkdir),
        ("twin", lambda path: os.link(tmp_path / DATA_FILE, path)),
    ):
        make(tmp_path / name)
        with pytest.raises(TrustError, match=r"not a plain file|second name"):
            check_files(tmp_path)
        with pytest.raises(OSError):
            open_plain(tmp_path / name)
        (tmp_path / name).rmdir() if name == "folder" else (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("[" * 100_000, "not JSON"),
        ("{", "not JSON"),
        ({"model": {"decoder": {"filename": "model.ort"}}}, "no .onnx file"),
        ({"model": {"vision": {"config_filename": "/etc/hostname"}}}, "no file of this release"),
        ({"a": [{"session_options": {"provider_options": [{"x": {}}]}}]}, "execution provider"),
        ({"a": [{"session_options": {"config_entries": {}}}]}, "session option 'config_entries'"),
    ],
)
def test_settings_of_the_runtime_are_judged_too(
    tmp_path: Path, config: object, sentence: str
) -> None:
    (tmp_path / "model.ort").write_bytes(b"x")
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "genai_config.json").write_text(text)

    with pytest.raises(TrustError, match=sentence):
        check_bundle(tmp_path)
