"""Gives a decoder of about ten million weights a graph for reading prompts: the same in 8 bits.

Knows graphs with MatMulNBits nodes of 4 bits. Does not know which machine opens which graph:
edge_sdk/genai_model.py.

A kernel that multiplies one row reads each weight once, so 4 bits are quickest. One that multiplies
many unpacks them again for every few rows; with the same numbers already in 8 bits ONNX Runtime
1.31 multiplies a prompt in 0.65 of the time (AVX-512 with VNNI). The 8-bit numbers are made from
the packed ones when the graph is loaded, since they depend on constants alone; they take memory, no
disk, and with the same scales and zero points they are the same weights.
"""

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_sdk.wire.manifest import PROMPT_FILE

LEAST_BYTES, MOST_BYTES = 4 * 2**20, 32 * 2**20
"""What the 8-bit weights may take. Beyond, they come from memory and not from a cache: a model of
135 M read prompts 5 % quicker for three times the memory. Below, the gain (10 % on 3.3 M) is not
worth a second model in memory."""

_ZERO = 8
"""The number that stands for 0, in both forms."""
_FORM = "/8bit"


def write_prompt_graph(answering: onnx.ModelProto, folder: Path) -> None:
    """Write the graph for prompts that goes with the graph `answering`, if the model is small.

    It has the same inputs, outputs and stored weights, and no data file of its own.
    """
    packed = _packed(answering.graph)
    if LEAST_BYTES <= sum(2 * math.prod(dims) for dims in packed.values()) <= MOST_BYTES:
        model = onnx.ModelProto()
        model.CopyFrom(answering)
        _widen(model.graph, packed)
        onnx.save(model, str(folder / PROMPT_FILE))


def _packed(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """The weights that are multiplied in 4 bits and not looked up, by name, with their shapes
    (N, blocks, bytes of a block)."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    others = {name for node in graph.node if not _is_narrow(node) for name in node.input}
    read = [node.input[1] for node in graph.node if _is_narrow(node)]
    return {name: shapes[name] for name in read if name not in others}


def _is_narrow(node: onnx.NodeProto) -> bool:
    """Whether it multiplies symmetric 4-bit weights with 8-bit activations."""
    if node.op_type != "MatMulNBits" or any(node.input[3:]):
        return False
    found = {a.name: a.i for a in node.attribute}
    return found.get("bits", 4) == 4 and found.get("accuracy_level") == 4


def _widen(graph: onnx.GraphProto, packed: dict[str, tuple[int, ...]]) -> None:
    for node in filter(_is_narrow, graph.node):
        data, weight, scales = node.input[:3]
        if weight not in packed:
            continue
        node.input[:] = [data, weight + _FORM, scales, f"{weight}{_FORM}/zeros"]
        next(a for a in node.attribute if a.name == "bits").i = 8
    made = [node for weight, dims in packed.items() for node in _unpacked(graph, weight, dims)]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*made, *rest])


def _unpacked(graph: onnx.GraphProto, weight: str, dims: tuple[int, ...]) -> list[onnx.NodeProto]:
    """The nodes that make `weight` of 8 bits, (N, blocks, block) uint8, and its zero points.

    ONNX's uint4 is packed as MatMulNBits packs its weights, so the stored bytes get that type and
    are cast. Only operators that devices have always let in (edge_sdk/graphs.py).
    """
    stored = next(tensor for tensor in graph.initializer if tensor.name == weight)
    stored.data_type = onnx.TensorProto.UINT4
    stored.dims[:] = [*dims[:-1], 2 * dims[-1]]
    shape = f"{weight}{_FORM}/shape"
    graph.initializer.append(numpy_helper.from_array(np.array(dims[:-1], np.int64), shape))
    zero = numpy_helper.from_array(np.array([_ZERO], np.uint8))
    wide, zeros = weight + _FORM, f"{weight}{_FORM}/zeros"
    return [
        helper.make_node("Cast", [weight], [wide], name=wide, to=onnx.TensorProto.UINT8),
        helper.make_node("ConstantOfShape", [shape], [zeros], name=zeros, value=zero),
    ]
