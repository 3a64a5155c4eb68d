"""Builds the torch model that trains on exactly the int4 weights that ONNX Runtime runs.

Knows torch, transformers' model classes and `WeightFile`. Does not know LoRA, training or ONNX.

Two ways to hold the same numbers: dequantized once ("dense", fast, 16 or 32 bits a weight) when
that fits the device's memory, else packed and dequantized a few rows at a time in the forward and
again in the backward pass ("packed", 4 to 5 bits a weight, slower). Both give the same gradients.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.errors import WeightsError
from compression.int4 import Packed, WeightFile

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 * 2**20
"""Size of a dequantized piece: small enough for a last-level cache, large enough for BLAS."""

TOKENS_DEFAULT = 8 * 128
"""Tokens in a training batch assumed by the memory rule: 8 examples of 128 tokens."""

ACTIVATIONS_PER_HIDDEN = 17
"""Values kept per token, layer and hidden unit for the backward pass (34 bytes at 16 bits).

Source: Korthikanti et al. 2022 (arXiv 2205.05198), equation 2, without the attention term.
"""


class Int4Linear(nn.Linear):
    """A frozen linear layer whose weight stays packed; `weight` dequantizes it on each access.

    Takes (..., in) and returns (..., out) in the input's dtype. It is an `nn.Linear` so that
    libraries which look for linear layers find it. The packed arrays live on the CPU and are no
    part of `state_dict`; `dtype` is what `weight` claims to be.
    """

    def __init__(
        self, packed: Packed, *, bias: nn.Parameter | None = None, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.bits, self.block, self.dtype = packed.bits, packed.block, dtype
        self._codes = _tensor(packed.codes)  # (out, bytes per row)
        self._scales = _tensor(packed.scales)  # (out, blocks)
        self._zero_points = None if packed.zero_points is None else _tensor(packed.zero_points)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The whole weight (out, in), dequantized now and not kept."""
        return self.rows(0, self.out_features, self.dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows start..stop of the weight, (stop - start, in), dequantized in float32 then cast."""
        codes = _unpack(self._codes[start:stop], self.bits)
        width = self._scales.shape[1] * self.block
        if codes.shape[1] != width:  # stored without padding to whole blocks
            codes = nn.functional.pad(codes, (0, width - codes.shape[1]))
        blocks = codes.view(stop - start, -1, self.block).float()
        if self._zero_points is None:
            blocks -= float(2 ** (self.bits - 1))
        else:
            zero = _unpack(self._zero_points[start:stop], self.bits)
            blocks -= zero[:, : self._scales.shape[1], None]
        blocks *= self._scales[start:stop, :, None].float()
        return blocks.view(stop - start, -1)[:, : self.in_features].to(dtype)

    def chunks(self) -> list[tuple[int, int]]:
        """Row ranges whose dequantized float32 copy is at most CHUNK_BYTES each."""
        step = max(1, CHUNK_BYTES // (4 * self.in_features))
        starts = range(0, self.out_features, step)
        return [(start, min(start + step, self.out_features)) for start in starts]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _PackedMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}"


class _PackedMatmul(torch.autograd.Function):
    # The weight is frozen, so the backward pass needs neither x nor a dequantized copy: it
    # dequantizes the same rows a second time.

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Int4Linear) -> torch.Tensor:
        ctx.layer = layer
        flat = x.reshape(-1, layer.in_features)  # (tokens, in)
        y = x.new_empty(flat.shape[0], layer.out_features)
        for start, stop in layer.chunks():
            y[:, start:stop] = flat @ layer.rows(start, stop, x.dtype).T
        return y.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        (grad,), layer = grads, ctx.layer
        if not ctx.needs_input_grad[0]:
            return None, None
        flat = grad.reshape(-1, layer.out_features)  # (tokens, out)
        total = grad.new_zeros(flat.shape[0], layer.in_features, dtype=torch.float32)
        for start, stop in layer.chunks():
            total += flat[:, start:stop] @ layer.rows(start, stop, grad.dtype)
        return total.to(grad.dtype).view(*grad.shape[:-1], layer.in_features), None


def load_slm(
    bundle_dir: Path | str,
    *,
    memory_mb: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = TOKENS_DEFAULT,
) -> Any:
    """Return the bundle's transformers model, frozen, in eval mode, with the bundle's weights.

    `memory_mb` is what training may use, in MiB (None: no limit). When the dequantized weights and
    the activations of `tokens` tokens fit, the weights are dequantized once; else the linear layers
    stay packed. `model.symbiont_weights` says which: "16-bit", "32-bit" or "int4 on the fly".

    Raises:
        WeightsError: the weights do not fit the bundle's config.json, or each other.
    """
    weights = WeightFile(bundle_dir)
    model = _empty_model(Path(bundle_dir), dtype)
    dense_mb = estimate_mb(weights, model.config, dtype=dtype, tokens=tokens)
    packed = memory_mb is not None and dense_mb > memory_mb
    if packed:
        _place_packed(model, weights, dtype)
    _place_dense(model, weights, dtype)
    model.requires_grad_(False)
    model.eval()
    model.symbiont_weights = "int4 on the fly" if packed else f"{8 * dtype.itemsize}-bit"
    logger.info(
        "weights held as %s: dequantized training would need %d MiB, allowed %s",
        model.symbiont_weights,
        dense_mb,
        "any" if memory_mb is None else f"{memory_mb} MiB",
    )
    return model


def estimate_mb(weights: WeightFile, config: Any, *, dtype: torch.dtype, tokens: int) -> int:
    """MiB that dequantized weights plus the activations of `tokens` tokens take, rounded up."""
    stored = {weights.source(name) for name in weights}
    values = sum(torch.Size(weights.shape(name)).numel() for name in stored)
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    kept = tokens * hidden * layers * ACTIVATIONS_PER_HIDDEN * dtype.itemsize
    logits = 3 * tokens * int(config.vocab_size) * 4  # logits, log-softmax and gradient in float32
    return -(-(values * dtype.itemsize + kept + logits) // 2**20)


def _empty_model(folder: Path, dtype: torch.dtype) -> Any:
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = getattr(config, "architectures", None) or []
    model_class: Any = getattr(transformers, names[0], None) if names else None
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known:
        raise WeightsError(
            f"{folder / 'config.json'}: architectures {names!r} is not a known model"
        )
    # Parameters on meta, buffers (rotary tables) real: the first come from the bundle, the second
    # are computed from the configuration and stored nowhere.
    with init_empty_weights(include_buffers=False):
        return model_class._from_config(config, dtype=dtype)


def _place_packed(model: Any, weights: WeightFile, dtype: torch.dtype) -> None:
    for name in weights:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or weights.kind(name) != "blockwise":
            continue
        layer = _module(model, path, name)
        if not isinstance(layer, nn.Linear) or weights.source(name) != name:
            continue  # embeddings, and heads tied to them, are dequantized once
        parent, _, child = path.rpartition(".")
        packed = Int4Linear(weights.packed(name), bias=layer.bias, dtype=dtype)
        if (packed.out_features, packed.in_features) != tuple(layer.weight.shape):
            raise WeightsError(f"{name}: shape {weights.shape(name)} is not the model's")
        setattr(_module(model, parent, name), child, packed)


def _place_dense(model: Any, weights: WeightFile, dtype: torch.dtype) -> None:
    placed: dict[str, nn.Parameter] = {}
    for name in sorted(weights, key=lambda n: weights.source(n) != n):  # sources before aliases
        path, _, leaf = name.rpartition(".")
        module = _module(model, path, name)
        if isinstance(module, Int4Linear) and leaf == "weight":
            continue
        source = weights.source(name)
        if source not in placed:
            value = torch.from_numpy(weights.dequantize(source)).to(dtype)
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
        # Quantized apart they are two matrices now; tying again would lose one of them.
        if isinstance(head, Int4Linear) or head.weight is not table.weight:
            model.config.tie_word_embeddings = False


def _module(model: Any, path: str, name: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError as exc:
        raise WeightsError(f"{name}: the model of config.json has no such weight") from exc


def _tensor(array: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        # The array is a read-only view of the mapped file, which is the point: the pages are
        # shared with ONNX Runtime and nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).view(packed.shape[0], -1)
