"""An encoder's graph as a file: traced, given LoRA inputs, its weights named for a trainer.

Knows torch's exporter, the layers of encoder_layers and `weights.json`. Does not know parity,
manifests or tokenizers.

The folder has the names that transformers.js and optimum look for, and holds the graph once:
onnx/model_quantized.onnx with its weights inside. `weights.json` names spans of that very file.
"""

import inspect
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_sdk.errors import ExportError
from exporters.encoder_layers import Outputs, fused, quantize
from exporters.lora_inputs import Linear, add_lora_inputs
from exporters.quiet import quiet

GRAPH_FILE = "onnx/model_quantized.onnx"
INDEX_FILE = "weights.json"
EMBEDDING = "sentence_embedding"
_NET = "net."
_OPSET = 21


def input_names(net: Any, tokenizer: Any) -> list[str]:
    """What the graph takes: the tokenizer's columns that the model reads, ids and mask at least."""
    takes = inspect.signature(net.forward).parameters
    known = ("input_ids", "attention_mask", "token_type_ids")
    given = {*tokenizer.model_input_names, "input_ids", "attention_mask"}
    return [name for name in known if name in takes and name in given]


def trace(net: Any, names: list[str], *, classifies: bool, context: int) -> onnx.ModelProto:
    """Quantize and trace `net`, which is changed in place; return the graph without LoRA inputs.

    Raises:
        ExportError: torch cannot export the architecture.
    """
    import torch

    quantize(net)
    # A tensor of its own for each: torch takes two names of one tensor for one input.
    given = {name: torch.ones(2, 16, dtype=torch.int64) for name in names}
    if "token_type_ids" in given:
        given["token_type_ids"].zero_()
    axes = {
        0: torch.export.Dim("batch_size", min=1, max=65_536),
        1: torch.export.Dim("sequence_length", min=2, max=context),
    }
    first = "logits" if classifies else "last_hidden_state"
    try:
        with quiet(), warnings.catch_warnings(), fused(net):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Outputs(net, classifies=classifies).eval(),
                kwargs=given,
                dynamo=True,
                dynamic_shapes=dict.fromkeys(names, axes),
                input_names=names,
                output_names=[first, EMBEDDING],
                opset_version=_OPSET,
                verbose=False,
            )
        assert program is not None
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise ExportError(f"torch cannot export {type(net).__name__}: {reason}") from exc
    return _plain(program.model_proto)


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the exporter's stack traces, which are half of a small file and name the paths of
    this machine, and without shapes in between: with them onnxruntime joins sums and norms into
    SkipLayerNormalization, which takes five times as long on a CPU (1.31)."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.ClearField("value_info")
    for tensor in graph.initializer:
        tensor.name = tensor.name.removeprefix(_NET)
    for node in graph.node:
        node.input[:] = [name.removeprefix(_NET) for name in node.input]
    return model


def finish(
    traced: onnx.ModelProto, exact: Collection[str] = ()
) -> tuple[onnx.ModelProto, dict[str, tuple[int, int]]]:
    """Return a copy of the graph with LoRA inputs, and {linear: (out, in)}.

    The linear layers named in `exact` multiply in 32 bits, with the same int8 weights.
    """
    model = onnx.ModelProto()
    model.CopyFrom(traced)
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    linears: dict[str, tuple[Linear, ...]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "DynamicQuantizeMatMul":
            nodes.append(node)
            continue
        name = node.input[1].removesuffix(".codes")
        width, rows = sizes[node.input[1]]
        made = _in_32_bits(node, name) if name in exact else [node]
        product = next(n for n in made if n.op_type.endswith("MatMul"))
        linears[product.name] = (Linear(name, rows, width),)
        nodes.extend(made)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model, add_lora_inputs(model, linears)


def _in_32_bits(node: onnx.NodeProto, name: str) -> list[onnx.NodeProto]:
    x, codes, scales = node.input[:3]
    bias, y = node.input[4] if len(node.input) > 4 else "", node.output[0]
    product = f"{y}/unbiased" if bias else y
    # Not DequantizeLinear: onnxruntime 1.31 makes a product of 8-bit inputs of that and a MatMul.
    # A cast constant is folded into 32-bit weights when the graph is loaded.
    float32, dense = onnx.TensorProto.FLOAT, f"{name}.dense"
    made = [
        helper.make_node("Cast", [codes], [f"{name}.cast"], name=f"{name}/cast", to=float32),
        helper.make_node("Mul", [f"{name}.cast", scales], [dense], name=f"{name}/dense"),
        helper.make_node("MatMul", [x, dense], [product], name=f"{name}/MatMul"),
    ]
    if bias:
        made.append(helper.make_node("Add", [product, bias], [y], name=f"{name}/bias"))
    return made


def save(folder: Path, model: onnx.ModelProto, parameters: Mapping[str, Any]) -> None:
    """Write the graph and the index of its weights into `folder`.

    `parameters` maps each parameter's Hugging Face name to its float32 value; one that the graph
    lacks is stored in it unused.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    by_bytes = {tensor.raw_data: name for name, tensor in stored.items() if tensor.raw_data}
    homes: dict[str, str] = {}
    for name, value in parameters.items():
        codes = name.removesuffix(".weight") + ".codes"
        if codes in stored:
            homes[name] = codes
            continue
        tensor = numpy_helper.from_array(np.ascontiguousarray(value, dtype="<f4"), name)
        homes[name] = by_bytes.get(tensor.raw_data, name)
        if homes[name] not in stored:
            model.graph.initializer.append(tensor)
            stored[name] = tensor
    (folder / GRAPH_FILE).parent.mkdir(exist_ok=True)
    data = model.SerializeToString(deterministic=True)
    (folder / GRAPH_FILE).write_bytes(data)
    spans, turned = _spans(data, model), _turned(model)
    tensors = {
        name: _entry(home, list(np.shape(parameters[name])), spans, turned)
        for name, home in homes.items()
    }
    index = {"format": 1, "data": GRAPH_FILE, "tensors": tensors}
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def _entry(
    home: str, shape: list[int], spans: Mapping[str, tuple[int, int]], turned: set[str]
) -> dict[str, Any]:
    if not home.endswith(".codes"):
        return {"kind": "dense", "dtype": "float32", "shape": shape, "data": list(spans[home])}
    scales = spans[home.removesuffix("codes") + "scales"]
    return {
        "kind": "int8",
        "shape": shape,
        "codes": list(spans[home]),
        "scales": [*scales, "float32"],
        "transposed": home in turned,
    }


def _turned(model: onnx.ModelProto) -> set[str]:
    """The codes that are kept as (in, out), as a product wants them."""
    products = {n.input[1] for n in model.graph.node if n.op_type == "DynamicQuantizeMatMul"}
    return products | {n.input[0] for n in model.graph.node if n.name.endswith("/cast")}


def _spans(data: bytes, model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Where each stored tensor's bytes are in the file."""
    spans: dict[str, tuple[int, int]] = {}
    at = 0
    for tensor in model.graph.initializer:
        if not tensor.raw_data:
            continue
        # Tensors are written in this order, so the search goes on where the last one ended.
        at = data.index(tensor.raw_data, at)
        spans[tensor.name] = (at, len(tensor.raw_data))
        at += len(tensor.raw_data)
    return spans
