"""Builds the torch model that trains on exactly the int4 weights that ONNX Runtime runs.

Knows torch, transformers' model classes and `WeightFile`. Does not know LoRA, training or ONNX.

Two ways to hold the same numbers: dequantized once ("dense", fast, 16 or 32 bits a weight), or
packed and dequantized for each use (`int4_layers`: 4.5 bits a weight with a 16-bit scale, and for
training a quarter slower). Both give the same gradients. Which of them a device takes is decided by
`edge_sdk.train.memory`.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.errors import WeightsError
from compression.int4 import Packed, WeightFile
from compression.int4_layers import TILE_WEIGHTS, Int4Embedding, Int4Linear, Tiles, scales_dtype

logger = logging.getLogger(__name__)


def load_slm(
    bundle_dir: Path | str, *, packed: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Return the bundle's transformers model, frozen, in eval mode, with the bundle's weights.

    With `packed` every blockwise matrix stays as it is stored and is dequantized for each use, else
    all are dequantized once, to `dtype`. `model.symbiont_weights` says how they are held: "16-bit",
    "32-bit" or "int4 on the fly".

    Raises:
        WeightsError: the weights do not fit the bundle's config.json, or each other.
    """
    weights = WeightFile(bundle_dir)
    model = empty_model(bundle_dir, dtype)
    if packed:
        _place_packed(model, weights, dtype)
    _place_dense(model, weights, dtype)
    model.requires_grad_(False)
    model.eval()
    model.symbiont_weights = "int4 on the fly" if packed else f"{8 * dtype.itemsize}-bit"
    logger.info("weights held as %s", model.symbiont_weights)
    return model


def empty_model(bundle_dir: Path | str, dtype: torch.dtype, *, buffers: bool = True) -> Any:
    """The model of the bundle's config.json without weights: parameters on the meta device.

    `buffers` are real by default (rotary tables are computed, not stored), else on meta as well.

    Raises:
        WeightsError: config.json names no model class that transformers has.
    """
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    folder = Path(bundle_dir)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = getattr(config, "architectures", None) or []
    model_class: Any = getattr(transformers, names[0], None) if names else None
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known:
        raise WeightsError(
            f"{folder / 'config.json'}: architectures {names!r} is not a known model"
        )
    with init_empty_weights(include_buffers=not buffers):
        return model_class._from_config(config, dtype=dtype)


def held_bytes(bundle_dir: Path | str, *, packed: bool, dtype: torch.dtype) -> int:
    """Bytes that the bundle's weights will take in memory, held in that way.

    Raises:
        WeightsError: the weights cannot be read.
    """
    weights = WeightFile(bundle_dir)
    total = 0
    for name in {weights.source(name) for name in weights}:
        values = torch.Size(weights.shape(name)).numel()
        if packed and weights.kind(name) == "blockwise":
            matrix = weights.packed(name)
            scale = scales_dtype(matrix).itemsize
            total += values * matrix.bits // 8 + matrix.scales.size * scale
        else:
            total += values * dtype.itemsize
    return total


def _place_packed(model: Any, weights: WeightFile, dtype: torch.dtype) -> None:
    tiles: dict[str, Tiles] = {}
    for name in weights:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or weights.kind(name) != "blockwise":
            continue
        layer, source = _module(model, path, name), weights.source(name)
        if not isinstance(layer, nn.Linear | nn.Embedding):
            continue
        if weights.shape(name) != tuple(layer.weight.shape):
            raise WeightsError(f"{name}: shape {weights.shape(name)} is not the model's")
        if source not in tiles:
            tiles[source] = Tiles(weights.packed(source))
        held: nn.Module
        if isinstance(layer, nn.Embedding):
            held = Int4Embedding(tiles[source], like=layer, dtype=dtype)
        else:
            held = Int4Linear(tiles[source], bias=layer.bias, dtype=dtype)
        parent, _, child = path.rpartition(".")
        setattr(_module(model, parent, name), child, held)


def _place_dense(model: Any, weights: WeightFile, dtype: torch.dtype) -> None:
    placed: dict[str, nn.Parameter] = {}
    for name in sorted(weights, key=lambda n: weights.source(n) != n):  # sources before aliases
        path, _, leaf = name.rpartition(".")
        module = _module(model, path, name)
        if isinstance(module, Int4Linear | Int4Embedding) and leaf == "weight":
            continue
        source = weights.source(name)
        if source not in placed:
            value = _dense(weights, source, dtype)
            placed[source] = nn.Parameter(value, requires_grad=False)
        current = getattr(module, leaf, None)
        if current is None or current.shape != placed[source].shape:
            raise WeightsError(f"{name}: shape {weights.shape(name)} is not the model's")
        setattr(module, leaf, placed[source])
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise WeightsError(f"the bundle lacks {len(missing)} weights, the first is {missing[0]}")
    if getattr(model.config, "tie_word_embeddings", False):
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        # Packed or quantized apart they are not one parameter; tying again would lose one of them.
        if isinstance(head, Int4Linear) or head.weight is not table.weight:
            model.config.tie_word_embeddings = False


def _dense(weights: WeightFile, name: str, dtype: torch.dtype) -> torch.Tensor:
    # A few rows at a time: an embedding at once would take 16 bytes a weight on the way.
    if weights.kind(name) != "blockwise":
        return torch.from_numpy(weights.dequantize(name)).to(dtype)
    matrix = weights.packed(name)
    value = torch.empty(matrix.shape, dtype=dtype)
    step = max(1, TILE_WEIGHTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, min(start + step, matrix.shape[0]))
        zero = None if matrix.zero_points is None else matrix.zero_points[rows]
        shape = (rows.stop - start, matrix.shape[1])
        part = Packed(
            matrix.bits, matrix.block, shape, matrix.codes[rows], matrix.scales[rows], zero
        )
        value[rows] = torch.from_numpy(part.dequantize())
    return value


def _module(model: Any, path: str, name: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError as exc:
        raise WeightsError(f"{name}: the model of config.json has no such weight") from exc
