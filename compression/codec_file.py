"""A codec as bytes (safetensors with one JSON record) and its encoder as an ONNX graph.

Knows the file's fields and limits. Does not know quantization; never reads or writes pickles.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save

from compression import tensor_file
from compression.basis import F16, Basis
from compression.blocks import KINDS, MAX_TENSORS, Layout
from compression.errors import CodecError
from compression.formats import CODEC_FORMATS
from compression.header import Method

FILE_NAME = "codec.safetensors"
FORMAT = 1
MOVING_FORMAT = 2
"""Of a moving codec's file, which version 1 did not know."""

MAX_FILE_BYTES = 64 * 2**20
"""A codec above this is refused unread: three encoders of 1024 x 1024 float16 are 6 MiB."""

_OPSET = 17
_IR_VERSION = 10  # the newest that ONNX Runtime 1.22, our oldest, reads


def format_of(method: Method) -> int:
    """The format of the file of a codec of this method."""
    return MOVING_FORMAT if method is Method.MOVING else FORMAT


def dump(
    layout: Layout, method: Method, ratio: float, basis: Basis | None, changes: Sequence[bytes] = ()
) -> bytes:
    """Return the codec as bytes; equal codecs give equal bytes."""
    record = {
        "format": format_of(method),
        "method": int(method),
        "ratio": ratio,
        "block": layout.block,
        "names": layout.names,
        "shapes": layout.shapes,
    }
    tensors: dict[str, Any] = {"empty": np.zeros(0, np.uint8)}
    if basis is not None:
        tensors = {"tensor_levels": basis.tensor_levels}
        for kind in layout.kinds:
            tensors[f"encoder.{kind}"] = basis.stored[kind]
            tensors[f"channel_levels.{kind}"] = basis.channel_levels[kind]
    for number, codes in enumerate(changes):
        tensors[f"change.{number}"] = np.frombuffer(codes, np.uint8)
    text = json.dumps(record, separators=(",", ":"), sort_keys=True)
    return save(tensors, metadata={"codec": text})


def parse(data: bytes) -> tuple[Layout, int, float, Basis | None, tuple[bytes, ...]]:
    """Return layout, method, ratio, basis and changes of a codec file.

    Raises:
        CodecError: not a codec file, over a limit, or inconsistent.
    """
    if len(data) > MAX_FILE_BYTES:
        raise CodecError(f"a codec file of {len(data)} bytes is over {MAX_FILE_BYTES}")
    try:
        tensors, metadata = tensor_file.read(data)
        record = json.loads(metadata["codec"])
        if record["format"] not in CODEC_FORMATS:
            raise CodecError(
                f"codec format {record['format']!r}; this version reads "
                f"{', '.join(map(str, CODEC_FORMATS))}; upgrade Symbiont here, or ask for codes of "
                "one of these"
            )
        names, shapes = tuple(record["names"]), tuple(tuple(shape) for shape in record["shapes"])
        method, ratio, block = record["method"], record["ratio"], record["block"]
    except (KeyError, TypeError, ValueError, RecursionError) as exc:
        if isinstance(exc, CodecError):
            raise
        raise CodecError(f"not a codec file: {exc}") from exc
    sizes_ok = all(isinstance(n, int) for shape in shapes for n in shape)
    names_ok = len(names) <= MAX_TENSORS and all(isinstance(name, str) for name in names)
    numbers_ok = isinstance(method, int) and isinstance(ratio, float) and isinstance(block, int)
    if not (sizes_ok and names_ok and numbers_ok):
        raise CodecError("not a codec file: a field has the wrong type")
    layout = Layout(names, shapes, block)
    basis = _basis(tensors, layout) if "tensor_levels" in tensors else None
    return layout, method, ratio, basis, _changes(tensors)


def encoder_graph(layout: Layout, basis: Basis) -> bytes:
    """The encoder as ONNX: "blocks" float32 (rows, block) -> "latents" float32 (rows, width)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    spans, nodes = layout.kind_rows, []
    constants = [
        numpy_helper.from_array(np.array([s.stop - s.start for s in spans.values()]), "rows")
    ]
    nodes.append(helper.make_node("Split", ["blocks", "rows"], list(spans), axis=0))
    for kind in spans:
        constants.append(numpy_helper.from_array(basis.encoders[kind], f"encoder.{kind}"))
        nodes.append(helper.make_node("MatMul", [kind, f"encoder.{kind}"], [f"latents.{kind}"]))
    nodes.append(helper.make_node("Concat", [f"latents.{k}" for k in spans], ["latents"], axis=0))
    graph = helper.make_graph(
        nodes,
        "symbiont-encoder",
        [helper.make_tensor_value_info("blocks", TensorProto.FLOAT, [layout.rows, layout.block])],
        [helper.make_tensor_value_info("latents", TensorProto.FLOAT, [layout.rows, basis.width])],
        initializer=constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _changes(tensors: dict[str, Any]) -> tuple[bytes, ...]:
    names = [f"change.{number}" for number in range(len(tensors))]
    found = [tensors[name] for name in names if name in tensors]
    if any(value.dtype != np.uint8 or value.ndim != 1 for value in found):
        raise CodecError("a codec file with changes that are no codes")
    return tuple(value.tobytes() for value in found)


def _basis(tensors: dict[str, Any], layout: Layout) -> Basis:
    stored: dict[str, F16] = {}
    levels: dict[str, Any] = {}
    wanted = {"tensor_levels": (len(layout.names),)}
    width = None
    for kind in layout.kinds:
        matrix = tensors.get(f"encoder.{kind}")
        if matrix is None or matrix.ndim != 2 or matrix.dtype != np.float16:
            raise CodecError(f"a codec file without a float16 encoder for kind {kind}")
        width = matrix.shape[1] if width is None else width
        if matrix.shape != (layout.block, width) or not 1 <= width <= layout.block:
            raise CodecError(f"encoder {kind} has shape {matrix.shape} for block {layout.block}")
        stored[kind] = matrix
        levels[kind] = tensors.get(f"channel_levels.{kind}")
        wanted[f"channel_levels.{kind}"] = (width,)
    for name, shape in wanted.items():
        value = tensors.get(name)
        if value is None or value.shape != shape or value.dtype != np.uint8:
            raise CodecError(f"a codec file without {name} as uint8 {shape}")
    if set(tensors) - set(wanted) - {f"encoder.{kind}" for kind in KINDS}:
        raise CodecError("a codec file with tensors that are none of its own")
    basis = Basis(stored, tensors["tensor_levels"], levels)
    basis.encoders  # noqa: B018 - derives them now, so that a wrong one is refused here
    return basis
