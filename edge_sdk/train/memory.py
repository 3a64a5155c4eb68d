"""What a training will need of memory, and the quickest way to do it that fits a ceiling.

Knows how weights may be held, that a step may be taken in parts and activations computed twice, and
what each costs. Does not know tasks, batches' contents or how much memory the device has.

What a forward pass keeps for the backward pass is not estimated by a formula: the model is built
on torch's meta device, which has shapes and no memory, and what it would keep is added up. Run with
a ceiling this takes a second; without one nothing is predicted.
"""

import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from compression.int4_layers import TILE_WEIGHTS
from compression.int4_torch import empty_model, held_bytes
from edge_sdk.errors import RuntimeFailure
from edge_sdk.train.lora import Adapter, LoraSpec

logger = logging.getLogger(__name__)

MIB = 2**20

FIXED_MB = 96
"""Kernels that torch prepares and keeps, code paged in at the first step, and fragments: what a
135 M model took beyond the rest of the prediction, a 3 M one half (examples/bench_training.py)."""

MARGIN = {False: 1.02, True: 1.14}
"""By whether weights are packed: what a ceiling needs beyond the prediction, since unpacking them
tile by tile leaves holes. Of 135 M, quiet: 1 to 2 % and 8 to 13 % (examples/bench_training.py)."""

FACTOR_BYTES = 20
"""Of each trained value: itself, its gradient, two moments and one passing copy, 32 bits each."""

SCRATCH_BYTES = TILE_WEIGHTS * (1 + 4 + 4)
"""One tile in 8 bits, in 32, and in the dtype of training."""

UNPACK_TOKENS = 18
"""Dequantizing a matrix once takes as long as training on so many tokens with it."""

PART_TOKENS = 8
"""So many tokens' time goes with each part that a step is divided into."""

AGAIN = 0.35
"""Share of a step added by computing activations a second time."""


@dataclass(frozen=True, slots=True)
class Way:
    """How to train: weights packed or not, sequences per part of a step (0: all), activations kept
    or computed again in the backward pass; and the MiB this is predicted to take at its peak."""

    packed: bool = False
    rows: int = 0
    again: bool = False
    peak_mb: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What the parts of a training take, in bytes; per row is per sequence of the longest width.

    dense, packed: the weights; factors: the trained values with gradients and moments;
    kept: activations of a row for the backward pass, in all layers; layer: in the largest layer;
    border: a row's hidden state between two layers; layers: their number; passing: what one
    sequence's widest operation holds for a moment; answer: one predicted token's logits.
    """

    dense: int
    packed: int
    factors: int
    kept: int
    layer: int
    border: int
    layers: int
    passing: int
    answer: int
    tokens: int


def needs_of(
    bundle: Path, spec: LoraSpec, *, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> Needs:
    """What training the bundle with such an adapter takes, on sequences of up to `tokens` tokens.

    Raises:
        WeightsError: the bundle cannot be read.
        ConfigError: the targets do not fit the model.
    """
    model = empty_model(bundle, dtype, buffers=False)
    adapter = Adapter(model, spec)
    total, each = _kept_bytes(model, tokens)
    config = model.config
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    widest = max([hidden, *(m.out_features for m in _linears(layers_of(model)))])
    heads = int(getattr(config, "num_attention_heads", 1))
    return Needs(
        dense=held_bytes(bundle, packed=False, dtype=dtype),
        packed=held_bytes(bundle, packed=True, dtype=dtype) + SCRATCH_BYTES,
        factors=FACTOR_BYTES * sum(a * b for a, b in adapter.layout.values()),
        kept=total,
        layer=each,
        border=tokens * hidden * dtype.itemsize,
        layers=layers,
        passing=4 * tokens * max(3 * widest, heads * tokens),
        answer=int(config.vocab_size) * 4 * 4,  # logits, log-softmax and both gradients, 32 bits
        tokens=tokens,
    )


def peak_mb(needs: Needs, way: Way, *, rows: int, answers: int) -> int:
    """MiB the way takes at its peak for steps of `rows` sequences with `answers` predicted tokens
    each, with a margin, rounded up."""
    at_once = min(way.rows or rows, rows)
    row = needs.kept
    if way.again:  # a state at every border, one layer at a time, and what no layer keeps
        outside = max(0, needs.kept - needs.layers * needs.layer)
        row = needs.layers * needs.border + needs.layer + outside
    held = needs.packed if way.packed else needs.dense
    row += needs.passing + answers * needs.answer
    predicted = (held + needs.factors + at_once * row) / MIB + FIXED_MB
    return math.ceil(MARGIN[way.packed] * predicted)


def quickest(needs: Needs, *, memory_mb: int, rows: int, answers: int) -> Way:
    """The quickest way that is predicted to fit `memory_mb` MiB.

    Raises:
        RuntimeFailure: even the leanest does not.
    """
    ways = [
        replace(way, peak_mb=peak_mb(needs, way, rows=rows, answers=answers)) for way in _ways(rows)
    ]
    fitting = [way for way in ways if way.peak_mb <= memory_mb]
    if not fitting:
        least = min(ways, key=lambda way: way.peak_mb)
        raise RuntimeFailure(
            f"training needs {least.peak_mb} MiB even in its leanest way (packed weights, one "
            f"sequence of {needs.tokens} tokens at a time); train.memory_mb allows {memory_mb}: "
            "raise it, or lower train.max_tokens"
        )
    way = min(fitting, key=lambda way: (_cost(needs, way, rows), way.peak_mb))
    logger.info("of %d MiB allowed training will take about %d: %s", memory_mb, way.peak_mb, way)
    return way


def compute_again(model: Any) -> None:
    """Have the model keep only what goes from layer to layer, and compute the rest once more.

    Source: Chen et al. 2016 (arXiv 1604.06174), with a segment per layer.
    """
    for layer in layers_of(model):
        again = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
        layer.forward = again  # no dropout is active in training here: nothing to repeat


def layers_of(model: Any) -> nn.ModuleList:
    """The model's decoder layers.

    Raises:
        RuntimeFailure: it has no list of as many as its configuration says.
    """
    count = int(model.config.num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise RuntimeFailure(f"the model shows no list of its {count} layers; its memory is not known")


def _ways(rows: int) -> Iterator[Way]:
    parts = {rows} | {-(-rows // 2**k) for k in range(1, rows.bit_length() + 1)}
    for at_once in sorted(parts, reverse=True):
        for again in (False, True):
            for packed in (False, True):
                yield Way(packed, 0 if at_once == rows else at_once, again)


def _cost(needs: Needs, way: Way, rows: int) -> float:
    """Seconds of a step, in units of the plain one."""
    parts, tokens = -(-rows // (way.rows or rows)), rows * needs.tokens
    cost = 1 + (parts - 1) * PART_TOKENS / tokens + (AGAIN if way.again else 0.0)
    if way.packed:
        cost += parts * (3 if way.again else 2) * UNPACK_TOKENS / tokens
    return cost


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (m for m in module.modules() if isinstance(m, nn.Linear))


def _kept_bytes(model: Any, tokens: int) -> tuple[int, int]:
    """Bytes kept for the backward pass by all of the model under its head, and by one layer."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="meta")
    owned = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # an address must not come to name a second tensor

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    before: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_: before.append(sum(kept.values())))
        for layer in layers_of(model)
    ]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    total = sum(kept.values())
    sizes = [b - a for a, b in zip(before, [*before[1:], total], strict=True)]
    return total, max(sizes)
