"""Names the bytes of an exported graph: which span of the data file is which Hugging Face weight.

Knows the builder's node names, MatMulNBits' layout and `weights.json` (read by compression.int4).
Does not know how the graph was made, LoRA or torch's modules beyond their names and shapes.

A trainer needs Hugging Face's tensors, the graph holds the builder's. Quantized matrices are the
same numbers under another name. Dense tensors are found by their bytes; one that the builder
changed (Gemma adds 1 to its norms) is appended to the data file, unused by the graph.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edge_sdk.errors import ExportError
from exporters.lora_inputs import Linear

DATA_FILE = "model.onnx.data"
INDEX_FILE = "weights.json"

_LAYER = re.compile(r"/layers\.(\d+)/(?:.*/)?(\w+)/MatMul(?:_Q\d|NBits)?$")
_BUILDERS_NAME = {"dense": "o_proj"}
"""Hugging Face's last name of a linear layer -> the builder's, where they differ (Phi)."""

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The builder's name of a matrix with the rows of several linear layers -> theirs, in order."""

_HF_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.(?:.*\.)?(\w+)$")

F32 = npt.NDArray[np.float32]


def layer_linears(
    model: onnx.ModelProto, hf_linears: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Linear, ...]]:
    """Match the rows of every quantized matrix of the decoder layers to Hugging Face's layers.

    `hf_linears` maps names such as "model.layers.0.self_attn.q_proj" to (out, in). Returns, by node
    name, the layers whose rows the node holds, in order.

    Raises:
        ExportError: a layer was left out, fused in a way not known here, or has another shape.
    """
    by_place = {}
    for name, (out, width) in hf_linears.items():
        match = _HF_LAYER.search(name)
        if match:
            leaf = _BUILDERS_NAME.get(match[2], match[2])
            by_place[(int(match[1]), leaf)] = Linear(name, out, width)
    found: dict[str, tuple[Linear, ...]] = {}
    for node in model.graph.node:
        match = _LAYER.search(node.name)
        if node.op_type != "MatMulNBits" or match is None:
            continue
        layer, leaf = int(match[1]), match[2]
        leaves = (leaf,) if (layer, leaf) in by_place else _FUSED.get(leaf, ())
        parts = tuple(by_place.pop((layer, name), Linear("", 0, 0)) for name in leaves)
        sizes = integers(node)
        fits = sum(part.out_features for part in parts) == sizes["N"]
        if not fits or any(part.in_features != sizes["K"] for part in parts):
            raise ExportError(
                f"the graph's {node.name} ({sizes['N']} x {sizes['K']}) is no linear layer of the "
                "model; this architecture's layers are fused or renamed by the builder"
            )
        found[node.name] = parts
    if by_place:
        raise ExportError(
            f"the linear layer {next(iter(by_place.values())).name} has no int4 rows in the graph; "
            "this architecture's layers are fused or left unquantized by the builder"
        )
    return found


def write_index(
    folder: Path,
    model: onnx.ModelProto,
    linears: Mapping[str, tuple[Linear, ...]],
    parameters: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], F32],
    *,
    tied: bool,
) -> None:
    """Write `weights.json` for the graph `model` in `folder`, appending what the graph lacks.

    `parameters` are the model's parameter names and shapes, ties listed once under their first
    name; `tensor(name)` gives a parameter's trained value.

    Raises:
        ExportError: a quantized matrix of the graph belongs to no parameter.
    """
    placed = spans(model)
    entries: dict[str, dict[str, Any]] = {}
    head = ""
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        if node.name in linears:
            start = 0
            for linear in linears[node.name]:
                stop = start + linear.out_features
                entries[f"{linear.name}.weight"] = _blockwise(node, placed, start, stop)
                start = stop
        elif "/lm_head/" in node.name:
            head = "lm_head.weight"
            entries[head] = _blockwise(node, placed, 0, integers(node)["N"])
        else:
            raise ExportError(f"the graph's {node.name} belongs to no weight of the model")
    table = next((n for n in parameters if n.endswith("embed_tokens.weight")), "")
    shared = any(node.op_type == "GatherBlockQuantized" for node in model.graph.node)
    if tied and shared and head:
        entries[table] = entries.pop(head)
        entries[head] = {"kind": "alias", "of": table}
    with open(folder / DATA_FILE, "r+b") as data:
        dense = _DenseFinder(model, placed, data.read())
        for name, shape in parameters.items():
            if name not in entries:
                entries[name] = dense.entry(tensor(name), shape)
        data.seek(0, 2)
        data.write(dense.appended)
    index = {"format": 1, "data": DATA_FILE, "tensors": entries}
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


class _DenseFinder:
    def __init__(
        self, model: onnx.ModelProto, placed: Mapping[str, tuple[int, int]], data: bytes
    ) -> None:
        self._known: dict[bytes, tuple[int, int]] = {}
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name in placed:
                offset, length = placed[tensor.name]
                self._known.setdefault(data[offset : offset + length], (offset, length))
        self._end = len(data)
        self.appended = b""

    def entry(self, value: F32, shape: tuple[int, ...]) -> dict[str, Any]:
        raw = np.ascontiguousarray(value, dtype="<f4").tobytes()
        span = self._known.get(raw)
        if span is None:
            span = (self._end + len(self.appended), len(raw))
            self.appended += raw
            self._known[raw] = span
        return {"kind": "dense", "dtype": "float32", "shape": list(shape), "data": list(span)}


def spans(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Offset and bytes in the data file of each of the graph's tensors that lies there, by name."""
    placed = {}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            placed[tensor.name] = (int(where.get("offset", 0)), int(where["length"]))
    return placed


def _blockwise(
    node: onnx.NodeProto, placed: Mapping[str, tuple[int, int]], start: int, stop: int
) -> dict[str, Any]:
    """The entry of rows start..stop of a node's matrix; rows lie one after the other."""
    sizes = integers(node)

    def rows(name: str) -> list[int]:
        offset, length = placed[name]
        width = length // sizes["N"]  # bytes of a row
        return [offset + start * width, (stop - start) * width]

    zero_points = node.input[3] if len(node.input) > 3 else ""
    return {
        "kind": "blockwise",
        "bits": sizes["bits"],
        "block": sizes["block_size"],
        "shape": [stop - start, sizes["K"]],
        "packed": rows(node.input[1]),
        "scales": [*rows(node.input[2]), "float32"],
        "zero_points": rows(zero_points) if zero_points else None,
    }


def integers(node: onnx.NodeProto) -> dict[str, int]:
    """A node's whole-number attributes, such as N, K, bits and block_size."""
    return {a.name: int(a.i) for a in node.attribute if a.type == onnx.AttributeProto.INT}
