"""Rounds a bundle's int4 weights anew: least change of layers' outputs on the model's own text.

Knows the model folder, what its linear layers read, and where a graph's codes lie in the data file.
Does not know how a matrix is rounded (exporters.rounding) or how the graph was made.

No data are needed: the trained model writes the text itself, seeded, half of it from the start of a
document and half from tokens drawn evenly, so that it is not of one kind only. What the builder
wrote keeps its shape and place; only codes and scales change, and only where that is a gain.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edge_sdk.errors import ExportError
from exporters.lora_inputs import Linear
from exporters.parity import few_threads
from exporters.rounding import Rounded, compensated, lost
from exporters.weights_index import DATA_FILE, integers, spans

logger = logging.getLogger(__name__)

ROWS, LENGTH = 32, 48
"""Texts and tokens of each: enough that the reference models lose less with blocks of 64 than they
did with blocks of 32, each rounded to the nearest. More tokens help little and take longer."""
BATCH = 16
SEED = 20261121
MOMENT_BYTES = 512 * 2**20
"""Second moments held at once; a model with more is run once for each such part of its layers."""
FOREIGN = 0.5
"""Relative output error above which codes are those of other weights: int4 costs about 0.1."""

Moments = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Gain:
    """Relative error of all layers' outputs on the text: rounded to nearest, and as written."""

    nearest: float
    written: float


def round_weights(
    folder: Path,
    graph: onnx.ModelProto,
    linears: Mapping[str, tuple[Linear, ...]],
    model_dir: Path,
) -> Gain:
    """Round the matrices of `linears` in `folder`'s data file for the model in `model_dir`.

    `graph` names the bytes of `folder`; `linears` has, by node, the layers whose rows it holds.

    Raises:
        ExportError: the model's outputs are no numbers, or a node holds other weights than its
            layers.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True
    ).eval()
    nodes = {node.name: node for node in graph.graph.node if node.name in linears}
    found, totals = spans(graph), np.zeros(3)
    with few_threads(model), torch.inference_mode(), open(folder / DATA_FILE, "r+b") as data:
        ids = written_by(model)
        for part in _parts(linears):
            for name, C in _moments(model, ids, {n: linears[n][0].name for n in part}).items():
                W = torch.cat([model.get_submodule(x.name).weight for x in linears[name]])
                totals += _round_node(data, nodes[name], found, W, C)
    nearest, written = np.sqrt(totals[:2] / max(totals[2], 1e-30))
    logger.info("rounding: output error %.4f, to nearest %.4f", written, nearest)
    return Gain(float(nearest), float(written))


def written_by(model: Any, *, rows: int = ROWS, length: int = LENGTH, seed: int = SEED) -> Any:
    """Token ids (rows, T <= length) that a causal model of transformers writes by sampling.

    Raises:
        ExportError: its logits are no numbers.
    """
    rng = torch.Generator().manual_seed(seed)
    config = model.config
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    token = torch.randint(config.vocab_size, (rows, 1), generator=rng)
    starts = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    start = starts[0] if isinstance(starts, Sequence) else starts
    if start is not None:
        token[: rows // 2] = start
    ids, cache = [token], None
    while len(ids) < length:
        made = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = made.past_key_values
        probabilities = torch.softmax(made.logits[:, -1].float(), -1)
        if not bool(torch.isfinite(probabilities).all()):
            raise ExportError(
                "the model's logits are not finite numbers; export one that was trained"
            )
        token = torch.multinomial(probabilities, 1, generator=rng)
        ids.append(token)
    return torch.cat(ids, 1)


def _parts(linears: Mapping[str, tuple[Linear, ...]]) -> Iterator[list[str]]:
    part: list[str] = []
    held = 0
    for name, layers in linears.items():
        size = 4 * layers[0].in_features ** 2
        if part and held + size > MOMENT_BYTES:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    yield part


def _moments(model: Any, ids: Any, layers: Mapping[str, str]) -> Moments:
    # Sum of x x^T over all tokens, of what each of `layers` reads.
    found: Moments = {}
    hooks = []
    for key, name in layers.items():

        def add(_: Any, given: tuple[Any, ...], key: str = key) -> None:
            x = given[0].flatten(0, -2)  # (tokens, in)
            if key not in found:
                found[key] = x.new_zeros(x.shape[1], x.shape[1])
            found[key].addmm_(x.T, x)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(add))
    try:
        for batch in ids.split(BATCH):
            model.base_model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _round_node(
    data: Any, node: onnx.NodeProto, found: Mapping[str, tuple[int, int]], W: Any, C: Any
) -> tuple[float, float, float]:
    """Write the better of two roundings; squared output errors to nearest, as written, of zero."""
    block, width = integers(node)["block_size"], W.shape[1]
    before = _read(data, found[node.input[1]], found[node.input[2]], len(W))
    nearest, whole = (lost(W, W0, C) for W0 in (before.values(width), torch.zeros_like(W)))
    if not nearest <= FOREIGN**2 * whole:
        raise ExportError(
            f"the graph's {node.name} holds other weights than its layers: relative output error "
            f"{math.sqrt(nearest / max(whole, 1e-30)):.2f}, int4 costs about 0.1; export with "
            "compensate=False, or report this model"
        )
    after = compensated(W, C, block)
    written = lost(W, after.values(width), C)
    if not written < nearest:
        return nearest, nearest, whole
    for name, value in ((node.input[1], after.packed()), (node.input[2], after.scales)):
        data.seek(found[name][0])
        data.write(value.numpy().tobytes())
    return nearest, written, whole


def _read(data: Any, codes: tuple[int, int], scales: tuple[int, int], rows: int) -> Rounded:
    parts = []
    for (offset, length), dtype in ((codes, np.uint8), (scales, np.dtype("<f4"))):
        data.seek(offset)
        raw = np.frombuffer(bytearray(data.read(length)), dtype)
        parts.append(torch.from_numpy(raw.reshape(rows, -1)))
    packed = parts[0]
    pairs = torch.stack([packed & 15, packed >> 4], -1)  # (rows, bytes, 2), low first
    return Rounded(pairs.flatten(1), parts[1])
