"""May this model file be loaded? Rules for a graph, its folder and its genai_config.json.

Knows which operators, sets, places of weights and settings are allowed. Does not know
signatures (trust.py), and runs nothing: it needs neither the `onnx` package nor ONNX Runtime, so
that no parser in C++ sees a file before this one has passed it.

Refused: an operator or operator set that is not on the list, so also every custom operator; weights
outside the model unless in a plain file of the same folder, within its length; training graphs;
folders, but for the one named "onnx" in which encoders keep their graph;
sizes and depths over `Limits`; a genai_config.json that names other files or a library.
"""

import json
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from edge_sdk.errors import TrustError
from edge_sdk.onnx_walk import LIMITS, Graph, Limits, walk
from edge_sdk.plain_files import open_plain

__all__ = [
    "LIMITS",
    "OPERATORS",
    "OPSETS",
    "Graph",
    "Limits",
    "check_bundle",
    "check_files",
    "check_graph",
]

GRAPH_SUFFIX = ".onnx"
CONFIG_FILE = "genai_config.json"
GRAPH_FOLDER = "onnx"
"""The one folder of a release: transformers.js and optimum look for encoders' graphs there."""

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
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})


def check_bundle(
    folder: Path, *, operators: frozenset[str] = OPERATORS, limits: Limits = LIMITS
) -> None:
    """Check every graph of a release folder and its genai_config.json.

    `folder` holds plain files only, each with one name, and perhaps one folder "onnx" of such.

    Raises:
        TrustError: a file, graph or setting that may not be loaded; names it and says why.
    """
    sizes = check_files(folder)
    for name in sorted(sizes):
        if name.lower().endswith(GRAPH_SUFFIX):
            place = name.removesuffix(Path(name).name)
            beside = {n.removeprefix(place): size for n, size in sizes.items() if place in n}
            check_graph(folder / name, beside, operators=operators, limits=limits)
    if CONFIG_FILE in sizes:
        _check_config(folder / CONFIG_FILE, sizes, limits)


def check_files(folder: Path) -> dict[str, int]:
    """Return the size of each file of `folder`, those of its folder "onnx" as "onnx/NAME".

    Raises:
        TrustError: something is a link of either kind, another folder, a pipe or a device.
    """
    sizes = _plain_sizes(folder)
    if GRAPH_FOLDER in sizes:
        del sizes[GRAPH_FOLDER]
        inner = _plain_sizes(folder / GRAPH_FOLDER)
        if GRAPH_FOLDER in inner:
            raise TrustError(f"{GRAPH_FOLDER}/{GRAPH_FOLDER} is not a plain file")
        sizes |= {f"{GRAPH_FOLDER}/{name}": size for name, size in inner.items()}
    return sizes


def _plain_sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    try:
        if folder.is_symlink():
            raise TrustError(f"the release folder {folder.name} is a link")
        with os.scandir(folder) as entries:
            for entry in entries:
                seen = entry.stat(follow_symlinks=False)
                if entry.name == GRAPH_FOLDER and stat.S_ISDIR(seen.st_mode):
                    sizes[GRAPH_FOLDER] = 0
                    continue
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
                    found = walk(mapped, limits)
        else:
            if not 0 < len(source) <= limits.graph:
                raise TrustError(f"it has {len(source)} bytes; allowed: 1 to {limits.graph}")
            found = walk(source, limits)
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
