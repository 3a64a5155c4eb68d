"""Adds LoRA inputs to a quantized decoder graph, so an adapter is data and not a new graph.

Knows MatMulNBits nodes and graph inputs with defaults. Does not know where the graph came from,
what the factors were trained on, or files.

Beside each chosen `y = MatMulNBits(x)` it adds `y + (x @ A) @ B` with A (in, r) and B (r, out).
Both are graph inputs whose default values have r = 0, and a product over an empty axis is zero:
with empty slots the graph computes what it computed before, to the last bit. A node that holds the
rows of several linear layers (q, k and v read the same x) gets a slot for each, and the products
are joined as its rows are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from edge_sdk.errors import ExportError


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer by its Hugging Face name: a node's rows, or some of them."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a linear layer is in a graph with slots: y[..., start:stop] = linear(x)."""

    x: str
    y: str
    start: int
    stop: int


def slot_names(linear: str) -> tuple[str, str]:
    """The two graph inputs of a linear layer, by its Hugging Face name."""
    return f"{linear}.lora_A", f"{linear}.lora_B"


def add_lora_inputs(
    model: onnx.ModelProto, linears: Mapping[str, tuple[Linear, ...]]
) -> dict[str, tuple[int, int]]:
    """Add a LoRA slot for each of `linears`, changing `model` in place.

    `linears` has, by node name, the layers whose rows a node holds, in the order of its rows.
    Returns {Hugging Face linear name: (out, in)}.

    Raises:
        ExportError: a node of `linears` is not in the graph.
    """
    slots: dict[str, tuple[int, int]] = {}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        parts = linears.get(node.name, ())
        if not parts:
            continue
        nodes.extend(_branch(node, parts))
        for linear in parts:
            _declare(model.graph, linear)
            slots[linear.name] = (linear.out_features, linear.in_features)
    missing = {linear.name for parts in linears.values() for linear in parts} - set(slots)
    if missing:
        raise ExportError(f"the graph has no node for {min(missing)}; export it again")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return slots


def places(model: onnx.ModelProto) -> dict[str, Place]:
    """Where each linear layer with a slot is, by its Hugging Face name."""
    graph = model.graph
    widths = {tensor.name: tensor.dims[-1] for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    found: dict[str, Place] = {}
    for node in graph.node:
        if not node.name.endswith("/lora_add"):
            continue
        joined = made[node.input[1]]
        start = 0
        for delta in joined.input if joined.op_type == "Concat" else [node.input[1]]:
            low, b = made[delta].input
            stop = start + widths[b]
            place = Place(made[low].input[0], node.output[0], start, stop)
            found[b.removesuffix(".lora_B")] = place
            start = stop
    return found


def _branch(node: onnx.NodeProto, parts: tuple[Linear, ...]) -> list[onnx.NodeProto]:
    x, y = node.input[0], node.output[0]
    # The sum keeps the old name, so that everything downstream reads it without being touched.
    node.output[0] = f"{y}/plain"
    made, deltas = [], []
    for part, linear in enumerate(parts):
        a, b = slot_names(linear.name)
        low, delta, at = f"{y}/lora_low_{part}", f"{y}/lora_delta_{part}", f"{node.name}/{part}"
        made += [
            helper.make_node("MatMul", [x, a], [low], name=f"{at}/lora_A"),  # (B, T, r)
            helper.make_node("MatMul", [low, b], [delta], name=f"{at}/lora_B"),  # (B, T, out)
        ]
        deltas.append(delta)
    if len(deltas) > 1:
        joined, name = f"{y}/lora_delta", f"{node.name}/lora_join"
        made.append(helper.make_node("Concat", deltas, [joined], name=name, axis=-1))
        deltas = [joined]
    total = helper.make_node("Add", [node.output[0], deltas[0]], [y], name=f"{node.name}/lora_add")
    return [*made, total]


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
