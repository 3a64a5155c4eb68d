"""May this model file be loaded? A bounded walk over the bytes of an ONNX graph, and its folder.

Knows the protobuf wire format, ONNX's field numbers and genai_config.json. Does not know
signatures (trust.py), and runs nothing: it needs neither the `onnx` package nor ONNX Runtime, so
that no parser in C++ sees a file before this one has passed it.

Refused: an operator or operator set that is not on the list, so also every custom operator; weights
outside the model unless in a plain file of the same folder, within its length; training graphs;
sizes and depths over `Limits`; a genai_config.json that names other files or a library.

Source: onnx.proto of ONNX 1.23, for the field numbers.
"""

import json
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_sdk.errors import TrustError
from edge_sdk.plain_files import open_plain

GRAPH_SUFFIX = ".onnx"
CONFIG_FILE = "genai_config.json"

_STANDARD = """
Abs Add And ArgMax Cast Ceil Clip Concat Constant ConstantOfShape Cos CumSum DequantizeLinear Div
DynamicQuantizeLinear Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
Greater GreaterOrEqual Identity If IsInf IsNaN LayerNormalization Less LessOrEqual Log LogSoftmax
MatMul MatMulInteger Max Min Mod Mul Neg Not Or Pad Pow QuantizeLinear Range Reciprocal ReduceMax
ReduceMean ReduceMin ReduceSum Relu Reshape RMSNormalization RotaryEmbedding ScatterElements
ScatterND Shape Sigmoid Sign SimplifiedLayerNormalization Sin SkipLayerNormalization Slice Softmax
Split Sqrt Squeeze Sub Sum Swish Tanh Tile TopK Transpose Trilu Unsqueeze Where
"""
_MICROSOFT = """
BiasGelu DynamicQuantizeMatMul EmbedLayerNormalization FastGelu FusedMatMul Gelu
GatherBlockQuantized GroupQueryAttention MatMulIntegerToFloat MatMulNBits MultiHeadAttention
QAttention QuickGelu RotaryEmbedding SimplifiedLayerNormalization SkipLayerNormalization
SkipSimplifiedLayerNormalization
"""

OPERATORS = frozenset(_STANDARD.split()) | {f"com.microsoft:{op}" for op in _MICROSOFT.split()}
"""What decoders and encoders of our exporters need, and their near kin; "domain:Name", or "Name"
for ONNX's own. Without Loop and Scan, and without EPContext, which reads files by name."""

OPSETS = {"": (11, 26), "com.microsoft": (1, 1)}
"""Operator set versions that are allowed, by domain."""

_SESSION_OPTIONS = frozenset(
    {
        "log_id",
        "log_severity_level",
        "intra_op_num_threads",
        "inter_op_num_threads",
        "enable_cpu_mem_arena",
        "enable_mem_pattern",
        "graph_optimization_level",
        "provider_options",
    }
)
_VALUES = frozenset({4, 5, 6, 7, 9, 10, 11})
"""The fields of TensorProto that hold values: floats, integers, strings or raw bytes."""
_PER_BYTE = 8  # no element type is smaller than a bit
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})


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


def check_bundle(
    folder: Path, *, operators: frozenset[str] = OPERATORS, limits: Limits = LIMITS
) -> None:
    """Check every graph of a release folder and its genai_config.json.

    `folder` holds plain files only, each with one name, and nothing else.

    Raises:
        TrustError: a file, graph or setting that may not be loaded; names it and says why.
    """
    sizes = check_files(folder)
    for name in sorted(sizes):
        if name.lower().endswith(GRAPH_SUFFIX):
            check_graph(folder / name, sizes, operators=operators, limits=limits)
    if CONFIG_FILE in sizes:
        _check_config(folder / CONFIG_FILE, sizes, limits)


def check_files(folder: Path) -> dict[str, int]:
    """Return the size of each file of `folder`, in which nothing may be a link or a folder.

    Raises:
        TrustError: something is a link of either kind, a folder, a pipe or a device.
    """
    sizes = {}
    try:
        if folder.is_symlink():
            raise TrustError(f"the release folder {folder.name} is a link")
        with os.scandir(folder) as entries:
            for entry in entries:
                seen = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(seen.st_mode):
                    raise TrustError(f"{entry.name} is not a plain file")
                if seen.st_nlink != 1:
                    raise TrustError(f"{entry.name} has a second name elsewhere (a hard link)")
                sizes[entry.name] = seen.st_size
    except OSError as exc:
        raise TrustError(f"the release folder {folder.name} cannot be read: {exc}") from exc
    return sizes


def check_graph(
    source: Path | bytes,
    files: Mapping[str, int] | None = None,
    *,
    operators: frozenset[str] = OPERATORS,
    limits: Limits = LIMITS,
) -> Graph:
    """Check one model, a file or its bytes; `files` gives the sizes of the files beside it.

    Raises:
        TrustError: it may not be loaded; says why.
    """
    name = source.name if isinstance(source, Path) else "the model"
    try:
        if isinstance(source, Path):
            with open_plain(source) as file:
                size = os.fstat(file.fileno()).st_size
                if not 0 < size <= limits.graph:
                    raise TrustError(f"it has {size} bytes; allowed: 1 to {limits.graph}")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    found = _walk(mapped, limits)
        else:
            if not 0 < len(source) <= limits.graph:
                raise TrustError(f"it has {len(source)} bytes; allowed: 1 to {limits.graph}")
            found = _walk(source, limits)
        _judge(found, files or {}, operators)
    except TrustError as exc:
        raise TrustError(f"{name} may not be loaded: {exc}") from exc
    except OSError as exc:
        raise TrustError(f"{name} cannot be read: {exc}") from exc
    return found


def _judge(found: Graph, files: Mapping[str, int], operators: frozenset[str]) -> None:
    for operator in sorted(found.operators - operators - found.functions):
        raise TrustError(
            f"it uses the operator {operator!r}, which is not on this device's list "
            "(runtime.operators adds to it)"
        )
    domains = {op.rpartition(":")[0] for op in found.operators - found.functions}
    for domain in sorted(domains):
        lowest, highest = OPSETS.get(domain, (1, 1))
        version = found.opsets.get(domain, 0)
        if not lowest <= version <= highest:
            raise TrustError(
                f"it uses version {version} of operator set {domain or 'ai.onnx'!r}; "
                f"allowed: {lowest} to {highest}"
            )
    for place in found.outside:
        unknown = place.keys() - _EXTERNAL_KEYS
        if unknown:
            raise TrustError(f"its weights carry the unknown key {min(unknown)[:40]!r}")
        location = place.get("location", "")
        if not _is_plain(location) or location not in files:
            raise TrustError(
                f"its weights are in {location[:200]!r}, which is no file of this release"
            )
        offset, length = _number(place, "offset"), _number(place, "length")
        if offset + length > files[location]:
            raise TrustError(
                f"its weights end at byte {offset + length} of {location}, which has "
                f"{files[location]}"
            )


def _is_plain(name: str) -> bool:
    return bool(name) and not set(name) & set("/\\\0:") and name not in (".", "..")


def _number(place: Mapping[str, str], key: str) -> int:
    text = place.get(key, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TrustError(f"the {key} {text[:40]!r} of its weights is not a number")
    return int(text)


def _check_config(path: Path, files: Mapping[str, int], limits: Limits) -> None:
    if files[path.name] > limits.config:
        raise TrustError(f"{path.name} has {files[path.name]} bytes; allowed: {limits.config}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise TrustError(f"{path.name} is not JSON: {exc}") from exc
    for key, value in _items(config):
        if key.endswith("filename") and isinstance(value, str):
            if not _is_plain(value) or value not in files:
                raise TrustError(
                    f"{path.name} names {value[:200]!r}, which is no file of this release"
                )
            if key == "filename" and not value.lower().endswith(GRAPH_SUFFIX):
                raise TrustError(f"{path.name} names the graph {value[:200]!r}, no .onnx file")
        if key == "session_options" and isinstance(value, dict):
            strange = value.keys() - _SESSION_OPTIONS
            if strange:
                raise TrustError(
                    f"{path.name} sets the session option {min(strange)[:40]!r}; allowed: "
                    f"{', '.join(sorted(_SESSION_OPTIONS))}"
                )
            if value.get("provider_options"):
                raise TrustError(f"{path.name} asks for another execution provider than the CPU")


def _items(value: object) -> Iterator[tuple[str, object]]:
    todo = [value]
    while todo:
        here = todo.pop()
        if isinstance(here, dict):
            for key, inner in here.items():
                yield str(key), inner
                todo.append(inner)
        elif isinstance(here, list):
            todo += here


# --- the walk -------------------------------------------------------------------------------------

_Data = mmap.mmap | bytes
_Span = tuple[int, int]
"""Begin and end of a field's bytes."""


def _walk(data: _Data, limits: Limits) -> Graph:
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
