"""Compares an encoder's graph with torch on the same int8 weights, text by text, on real text.

Knows how to run both, what disagreement is allowed, and which layer adds most of it. Does not know
how the graph was made.

The relative logit error is |z - z'| / |z| over all texts, each row centred first where there are
several labels. Torch multiplies in 32 bits; what is left is the rounding of inputs to 8 bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import GOLDEN_FILE, Golden, GoldenRow, encode_golden
from exporters.encoder_graph import EMBEDDING, GRAPH_FILE
from exporters.parity import MAX_TOKENS, relative

F32 = npt.NDArray[np.float32]
Feed = dict[str, npt.NDArray[np.int64]]

GOLDEN_ROWS, GOLDEN_COLUMNS = 4, 64
ROUNDED = 6
"""Decimals of a figure in a manifest."""


@dataclass(frozen=True, slots=True)
class EncoderLimits:
    """Disagreement above which an export stops.

    `metric_points`: percentage points of accuracy, against the model in 16 bits, on examples.
    `exact_share`: of the linear layers, those that may be multiplied in 32 bits to get there.
    """

    logit_error: float = 0.02
    agreement: float = 0.95
    metric_points: float = 1.0
    exact_share: float = 0.25


def tokenize(folder: Path, texts: Sequence[str], *, context: int) -> list[Feed]:
    """One text's inputs each, (1, T) int64, T at most MAX_TOKENS and `context`.

    Raises:
        ExportError: the tokenizer makes no token of any text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(MAX_TOKENS, context))
    rows = [row.ids for row in tokenizer.encode_batch(list(texts)) if row.ids]
    if not rows:
        raise ExportError("the parity text has no tokens; give text_for_parity that is not empty")
    return [feed_of(row) for row in rows]


def feed_of(row: Sequence[int]) -> Feed:
    """The inputs of one text; a single token gets a masked neighbour, as graphs take two."""
    ids = np.asarray([[*row, *[0] * (2 - len(row))]], np.int64)
    mask = (np.arange(ids.shape[1]) < len(row)).astype(np.int64)[None]
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def torch_answers(model: Any, names: Sequence[str], feeds: Sequence[Feed]) -> F32:
    """Torch's logits (texts, labels) float32, or sentence embeddings (texts, d) without labels."""
    import torch

    from exporters.encoder_layers import sentence_embedding

    found = []
    with torch.inference_mode():
        for feed in feeds:
            given = {name: torch.from_numpy(feed[name]) for name in names}
            answer = model(**given)
            logits = getattr(answer, "logits", None)
            if logits is None:
                logits = sentence_embedding(answer[0].float(), given["attention_mask"])
            found.append(logits[0].float().numpy())
    return np.stack(found)


def graph_answers(folder: Path, feeds: Sequence[Feed]) -> F32:
    """The same of the graph in `folder`."""
    session = _session(folder / GRAPH_FILE)
    names = [value.name for value in session.get_outputs()]
    wanted = "logits" if "logits" in names else EMBEDDING
    takes = {value.name for value in session.get_inputs()}
    rows = [session.run([wanted], {k: v for k, v in f.items() if k in takes})[0][0] for f in feeds]
    return np.stack(rows)


def compare(theirs: F32, ours: F32, *, classifies: bool) -> dict[str, float]:
    """The figures by name: logit_error, and the share of texts with the same label."""
    if not classifies:
        return {"embedding_error": relative(theirs, ours)}
    same = float((theirs.argmax(-1) == ours.argmax(-1)).mean())
    return {"logit_error": relative(_centred(theirs), _centred(ours)), "agreement": same}


def within(figures: Mapping[str, float], limits: EncoderLimits) -> bool:
    """Whether no figure of `compare` is over its limit (NaN is)."""
    error = figures.get("logit_error", figures.get("embedding_error", 0.0))
    return error <= limits.logit_error and figures.get("agreement", 1.0) >= limits.agreement


def layer_errors(folder: Path, model: Any, names: Sequence[str], feed: Feed) -> dict[str, float]:
    """The relative error that each linear layer adds to what it received, the worst first.

    Compares each layer's input and output in the graph with those in torch's `model`.
    """
    import torch

    graph = onnx.load(str(folder / GRAPH_FILE))
    linears = _places(graph.graph)
    seen: dict[str, tuple[F32, F32]] = {}
    hooks = []
    for name in linears:

        def keep(_: Any, given: Any, made: Any, name: str = name) -> None:
            seen[name] = (given[0].float().numpy(), made.float().numpy())

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        with torch.inference_mode():
            model(**{name: torch.from_numpy(feed[name]) for name in names})
    finally:
        for hook in hooks:
            hook.remove()
    linears = {name: pair for name, pair in linears.items() if name in seen}
    edges = list(dict.fromkeys(edge for pair in linears.values() for edge in pair))
    known = {value.name for value in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=e) for e in edges if e not in known)
    values = dict(
        zip(edges, _session(graph.SerializeToString()).run(edges, _only(feed, names)), strict=True)
    )
    added = {}
    for name, pair in linears.items():
        came, left = (relative(values[e], t) for e, t in zip(pair, seen[name], strict=True))
        added[name] = left - came
    return dict(sorted(added.items(), key=lambda item: -item[1]))


def write_golden(folder: Path, feeds: Sequence[Feed]) -> None:
    """Write what the graph answers to a few texts into `golden.json`, for the trial on a device."""
    rows = []
    for feed, answer in zip(feeds, graph_answers(folder, feeds[:GOLDEN_ROWS]), strict=False):
        columns = np.unique(np.linspace(0, len(answer) - 1, GOLDEN_COLUMNS).astype(np.int64))
        ids = feed["input_ids"][feed["attention_mask"] > 0]
        rows.append(
            GoldenRow(
                tuple(int(i) for i in ids),
                tuple(int(i) for i in columns),
                tuple(round(float(z), ROUNDED) for z in answer[columns]),
            )
        )
    (folder / GOLDEN_FILE).write_bytes(encode_golden(Golden(tuple(rows))))


def _places(graph: onnx.GraphProto) -> dict[str, tuple[str, str]]:
    """{Hugging Face linear: (its input's name, its output's name)}, by the LoRA slots."""
    readers = {name: node for node in graph.node for name in node.input}
    found = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1].endswith(".lora_A"):
            last = readers[readers[node.output[0]].output[0]]
            name = node.input[1].removesuffix(".lora_A")
            after = readers.get(last.output[0])
            if after is not None and after.name == f"{name}/bias":
                last = after
            found[name] = (node.input[0], last.output[0])
    return found


def _only(feed: Feed, names: Sequence[str]) -> Feed:
    return {name: feed[name] for name in names}


def _session(source: Path | bytes) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if isinstance(source, bytes):  # every value asked for must survive
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = source if isinstance(source, bytes) else str(source)
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def _centred(logits: F32) -> F32:
    if logits.shape[-1] == 1:
        return logits
    centred: F32 = logits - logits.mean(axis=-1, keepdims=True)
    return centred
