"""Walks over the bytes of an ONNX model and notes what must be judged, within bounds.

Knows the protobuf wire format and ONNX's field numbers. Does not know files, or what is allowed:
`graphs.py` judges. Weights are stepped over, never copied; nothing is run.

Source: onnx.proto of ONNX 1.23, for the field numbers.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field

from edge_sdk.errors import TrustError

_VALUES = frozenset({4, 5, 6, 7, 9, 10, 11})
"""The fields of TensorProto that hold values: floats, integers, strings or raw bytes."""
_PER_BYTE = 8  # no element type is smaller than a bit


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes above which a graph is refused; bytes unless said otherwise."""

    graph: int = 2**31 - 1  # protobuf's own limit
    config: int = 1 << 20
    nodes: int = 1 << 20  # number
    depth: int = 8  # graphs within graphs
    elements: int = 1 << 36  # of one stored tensor


LIMITS = Limits()


@dataclass(slots=True)
class Graph:
    """What was found: operators as "domain:Name", operator sets, places of weights outside."""

    operators: set[str] = field(default_factory=set)
    opsets: dict[str, int] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)
    outside: list[dict[str, str]] = field(default_factory=list)
    nodes: int = 0


_Data = mmap.mmap | bytes
_Span = tuple[int, int]
"""Begin and end of a field's bytes."""


def walk(data: _Data, limits: Limits) -> Graph:
    """Read what must be judged; the bytes of weights are stepped over, never copied."""
    found = Graph()
    graphs = 0
    for number, _, span in _fields(data, 0, len(data)):
        if number == 7:  # ModelProto.graph
            graphs += 1
            _walk_graph(data, span, found, limits, 0)
        elif number == 8:  # .opset_import
            _walk_opset(data, span, found)
        elif number == 14:  # .metadata_props
            if "ort_config" in _pair(data, span).values():
                raise TrustError("it carries settings for the runtime")
        elif number == 20:  # .training_info
            raise TrustError("it carries a training graph")
        elif number == 25:  # .functions
            _walk_function(data, span, found, limits)
    if graphs != 1:
        raise TrustError(f"it holds {graphs} graphs where one is expected; it is no ONNX model")
    return found


def _walk_graph(data: _Data, span: _Span, found: Graph, limits: Limits, depth: int) -> None:
    if depth > limits.depth:
        raise TrustError(f"its graphs are nested deeper than {limits.depth}")
    for number, _, inner in _fields(data, *span):
        if number == 1:  # GraphProto.node
            _walk_node(data, inner, found, limits, depth)
        elif number == 5:  # .initializer
            _walk_tensor(data, inner, found, limits)
        elif number == 15:  # .sparse_initializer
            _walk_sparse(data, inner, found, limits)


def _walk_node(data: _Data, span: _Span, found: Graph, limits: Limits, depth: int) -> None:
    found.nodes += 1
    if found.nodes > limits.nodes:
        raise TrustError(f"it has more than {limits.nodes} nodes")
    names: dict[int, str] = {}
    for number, _, inner in _fields(data, *span):
        if number in (4, 7):  # NodeProto.op_type, .domain
            if number in names:
                raise TrustError("a node names its operator twice")
            names[number] = _text(data, inner)
        elif number == 5:  # .attribute
            for kind, _, part in _fields(data, *inner):
                if kind in (5, 10):  # AttributeProto.t, .tensors
                    _walk_tensor(data, part, found, limits)
                elif kind in (6, 11):  # .g, .graphs
                    _walk_graph(data, part, found, limits, depth + 1)
                elif kind in (22, 23):  # .sparse_tensor, .sparse_tensors
                    _walk_sparse(data, part, found, limits)
    found.operators.add(_operator(names.get(7, ""), names.get(4, "")))


def _operator(domain: str, name: str) -> str:
    return f"{domain}:{name}" if domain not in ("", "ai.onnx") else name


def _walk_function(data: _Data, span: _Span, found: Graph, limits: Limits) -> None:
    names: dict[int, str] = {}
    for number, _, inner in _fields(data, *span):
        if number in (1, 10):  # FunctionProto.name, .domain
            names[number] = _text(data, inner)
        elif number == 7:  # .node
            _walk_node(data, inner, found, limits, 1)
        elif number == 9:  # .opset_import
            _walk_opset(data, inner, found)
    name = _operator(names.get(10, ""), names.get(1, ""))
    if ":" not in name:
        raise TrustError(f"it defines the standard operator {name[:80]!r} anew")
    found.functions.add(name)


def _walk_opset(data: _Data, span: _Span, found: Graph) -> None:
    domain, version = "", 0
    for number, value, inner in _fields(data, *span):
        if number == 1:  # OperatorSetIdProto.domain
            domain = _text(data, inner)
        elif number == 2:  # .version
            version = value
    domain = "" if domain == "ai.onnx" else domain
    if found.opsets.setdefault(domain, version) != version:
        raise TrustError(f"it imports two versions of operator set {domain or 'ai.onnx'!r}")


def _walk_sparse(data: _Data, span: _Span, found: Graph, limits: Limits) -> None:
    for number, _, inner in _fields(data, *span):
        if number in (1, 2):  # SparseTensorProto.values, .indices
            _walk_tensor(data, inner, found, limits)


def _walk_tensor(data: _Data, span: _Span, found: Graph, limits: Limits) -> None:
    elements, outside, place = 1, False, dict[str, str]()
    held = 0
    for number, value, inner in _fields(data, *span):
        if number in _VALUES:
            held += 1 + inner[1] - inner[0]  # one value, or bytes of them
        elif number == 1:  # TensorProto.dims, packed or not
            for size in _varints(data, inner) if inner[1] > inner[0] else (value,):
                elements *= size
                if elements > limits.elements:
                    raise TrustError(f"a stored tensor has over {limits.elements} elements")
        elif number == 13:  # .external_data
            pair = _pair(data, inner)
            key = pair.get("key", "")
            if key in place:
                raise TrustError(f"its weights name their {key[:40]} twice")
            place[key] = pair.get("value", "")
            outside = True
        elif number == 14:  # .data_location
            outside |= value != 0
    if outside:
        found.outside.append(place)
    elif elements > _PER_BYTE * held:
        raise TrustError(f"a stored tensor announces {elements} elements and holds fewer")


def _pair(data: _Data, span: _Span) -> dict[str, str]:
    found = {"key": "", "value": ""}
    for number, _, inner in _fields(data, *span):
        if number in (1, 2):  # StringStringEntryProto.key, .value
            found["key" if number == 1 else "value"] = _text(data, inner)
    return found


def _text(data: _Data, span: _Span) -> str:
    if span[1] - span[0] > 4096:
        raise TrustError("a name in it is longer than 4096 bytes")
    try:
        return data[span[0] : span[1]].decode()
    except UnicodeDecodeError as exc:
        raise TrustError("a name in it is not UTF-8") from exc


def _varints(data: _Data, span: _Span) -> Iterator[int]:
    at = span[0]
    while at < span[1]:
        value, at = _varint(data, at, span[1])
        yield value


def _fields(data: _Data, at: int, end: int) -> Iterator[tuple[int, int, _Span]]:
    """Yield (field number, value of a varint, span of bytes) of one message."""
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at, end)
            yield number, value, (at, at)
            continue
        if wire == 2:
            length, at = _varint(data, at, end)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise TrustError("it is not protobuf, or uses groups")
        if length > end - at:
            raise TrustError("it is cut off, or is no ONNX model")
        yield number, 0, (at, at + length)
        at += length


def _varint(data: _Data, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise TrustError("it is cut off, or is no ONNX model")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
