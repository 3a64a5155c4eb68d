"""Adds LoRA inputs to a quantized decoder graph, so an adapter is data and not a new graph.

Knows MatMulNBits nodes and graph inputs with defaults. Does not know where the graph came from,
what the factors were trained on, or files.

Beside each chosen `y = MatMulNBits(x)` it adds `y + (x @ A) @ B` with A (in, r) and B (r, out).
Both are graph inputs whose default values have r = 0, and a product over an empty axis is zero:
with empty slots the graph computes what it computed before, to the last bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from edge_sdk.errors import ExportError


@dataclass(frozen=True, slots=True)
class Linear:
    """One quantized linear layer of the graph: its node's name and its Hugging Face name."""

    node: str
    name: str
    out_features: int
    in_features: int


def slot_names(linear: str) -> tuple[str, str]:
    """The two graph inputs of a linear layer, by its Hugging Face name."""
    return f"{linear}.lora_A", f"{linear}.lora_B"


def add_lora_inputs(
    model: onnx.ModelProto, linears: Mapping[str, Linear]
) -> dict[str, tuple[int, int]]:
    """Add a LoRA slot beside every node of `linears` (by node name), changing `model` in place.

    Returns {Hugging Face linear name: (out, in)}.

    Raises:
        ExportError: a node of `linears` is not in the graph.
    """
    slots: dict[str, tuple[int, int]] = {}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        linear = linears.get(node.name)
        if linear is None:
            continue
        nodes.extend(_branch(node, linear))
        _declare(model.graph, linear)
        slots[linear.name] = (linear.out_features, linear.in_features)
    missing = {linear.name for linear in linears.values()} - set(slots)
    if missing:
        raise ExportError(f"the graph has no node for {sorted(missing)[0]}; export it again")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return slots


def _branch(node: onnx.NodeProto, linear: Linear) -> list[onnx.NodeProto]:
    a, b = slot_names(linear.name)
    x, y = node.input[0], node.output[0]
    plain, low, delta = f"{y}/plain", f"{y}/lora_low", f"{y}/lora_delta"
    # The sum keeps the old name, so that everything downstream reads it without being touched.
    node.output[0] = plain
    return [
        helper.make_node("MatMul", [x, a], [low], name=f"{node.name}/lora_A"),  # (B, T, r)
        helper.make_node("MatMul", [low, b], [delta], name=f"{node.name}/lora_B"),  # (B, T, out)
        helper.make_node("Add", [plain, delta], [y], name=f"{node.name}/lora_add"),
    ]


def _declare(graph: onnx.GraphProto, linear: Linear) -> None:
    a, b = slot_names(linear.name)
    # A name of its own for each slot's r: an adapter may leave some slots at rank 0, and
    # onnxruntime lets axes of one name share buffers.
    r = f"{linear.name}.rank"
    shapes: dict[str, list[int | str]] = {a: [linear.in_features, r], b: [r, linear.out_features]}
    for name, shape in shapes.items():
        empty = [0 if axis == r else axis for axis in shape]
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        graph.initializer.append(
            TensorProto(name=name, data_type=TensorProto.FLOAT, dims=empty, raw_data=b"")
        )
