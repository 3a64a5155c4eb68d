"""Cuts a decoder graph down to what answering needs: the logits after each text's last token.

Knows graphs whose attention is GroupQueryAttention. Does not know files or models.

All T rows of a prompt are needed only up to the last attention; what comes after it works row by
row, and in a 135 M model the head alone is a fifth of all products. So the rows are picked right
behind that attention: row min(n, T) - 1 of a text whose mask counts n tokens. For a prompt, padded
on the right or not, this is its last token; for tokens appended to one text (n >= T) it is the last
of them; for a single token it is that one.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_sdk.errors import ExportError

_ATTENTION = "GroupQueryAttention"
_ROWS = "/last_row/rows"


def keep_last_row(model: onnx.ModelProto) -> None:
    """Change `model` so that its logits are (B, 1, vocab), those after each text's last token.

    Raises:
        ExportError: the graph has no GroupQueryAttention node or no logits.
    """
    graph = model.graph
    nodes = list(graph.node)
    places = [i for i, node in enumerate(nodes) if node.op_type == _ATTENTION]
    logits = next((value for value in graph.output if value.name == "logits"), None)
    if not places or logits is None:
        raise ExportError("the graph has no grouped attention or no logits; the builder changed")
    later = _after(nodes, places[-1])
    picked = _pick(nodes, later)
    start = places[-1] + 1
    _number_axis(graph, {name for i in later for name in nodes[i].output}, logits)
    del graph.node[:]
    # Everything the picked rows depend on is made before the last attention's successors; what
    # stands between them and does not depend on it may stay where it is only if it comes first.
    between = [node for i, node in enumerate(nodes) if i >= start and i not in later]
    graph.node.extend([*nodes[:start], *between, *_row_numbers(graph), *picked])
    graph.node.extend(nodes[i] for i in later)


def _after(nodes: list[onnx.NodeProto], attention: int) -> list[int]:
    """Indices of the nodes that read, however indirectly, what the last attention gives."""
    values, later = {nodes[attention].output[0]}, []
    for i in range(attention + 1, len(nodes)):
        if values.intersection(nodes[i].input):
            values.update(nodes[i].output)
            later.append(i)
    return later


def _pick(nodes: list[onnx.NodeProto], later: list[int]) -> list[onnx.NodeProto]:
    """Let the nodes `later` read single rows; returns the nodes that pick them."""
    inside = {name for i in later for name in nodes[i].output}
    made = {name for node in nodes if node.op_type != "Constant" for name in node.output}
    names: dict[str, str] = {}
    for i in later:
        for at, name in enumerate(nodes[i].input):
            if name in made and name not in inside:
                names.setdefault(name, f"/last_row/{len(names)}")
                nodes[i].input[at] = names[name]
    return [
        helper.make_node("GatherND", [old, _ROWS], [new], name=new, batch_dims=1)  # (B, 1, width)
        for old, new in names.items()
    ]


def _row_numbers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that make _ROWS, (B, 1, 1) int64."""
    one, axes, name = "/last_row/one", "/last_row/axes", "/last_row"
    for key, value in ((one, [1]), (axes, [1, 2])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), key))
    node = helper.make_node
    return [
        node("ReduceSum", ["attention_mask", one], [f"{name}/n"], name=f"{name}/n", keepdims=0),
        node("Shape", ["input_ids"], [f"{name}/T"], name=f"{name}/T", start=1, end=2),
        node("Min", [f"{name}/n", f"{name}/T"], [f"{name}/min"], name=f"{name}/min"),
        node("Sub", [f"{name}/min", one], [f"{name}/last"], name=f"{name}/last"),  # (B,)
        node("Unsqueeze", [f"{name}/last", axes], [_ROWS], name=_ROWS),
    ]


def _number_axis(graph: onnx.GraphProto, made: set[str], logits: onnx.ValueInfoProto) -> None:
    """Forget the shapes of values that had T rows, and state that of the logits."""
    known = [value for value in graph.value_info if value.name not in made]
    del graph.value_info[:]
    graph.value_info.extend(known)
    rows = logits.type.tensor_type.shape.dim[1]
    rows.Clear()
    rows.dim_value = 1
