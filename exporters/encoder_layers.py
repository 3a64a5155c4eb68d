"""What an encoder's layers become while torch traces them: int8 products, fused attention.

Knows ONNX Runtime's fused operators and how to put them in the place of torch's. Does not know
files, parity or training.

Patterns in a finished graph are fragile: of torch 2.13's export onnxruntime's own optimizer fuses
no attention of BERT and fails on ModernBERT. So the fused operators are named at their source,
through transformers' table of attention functions, and need no pattern.

A linear layer keeps int8 codes (in, out) with one scale per output; its input is quantized to 8
bits when it runs. A code is at most 63, not 127: processors without integer dot products (AVX2)
add two products in 16 bits, and 2 x 255 x 64 is the most that surely fits.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.onnx import ops

CODE_MAX, TABLE_MAX = 63, 127
"""Largest codes of a layer's and of an embedding's weights; tables are looked up, not added."""

TABLE_ROWS_MIN = 1024
"""Embeddings with fewer rows (positions, token types) are small and stay in 32 bits."""

_NAME = "symbiont_graph"


class Int8Linear(nn.Module):
    """Takes the place of a linear layer: (..., in) float32 to (..., out)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scales = _quantized(linear.weight, CODE_MAX)
        self.register_buffer("codes", codes.T.contiguous())  # (in, out)
        self.register_buffer("scales", scales)  # (out,)
        self.bias, self.out_features = linear.bias, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.out_features)
        given = (x, self.codes, self.scales, None, self.bias)
        return _operator("DynamicQuantizeMatMul", given, {}, shape)


class Int8Table(nn.Module):
    """Takes the place of an embedding: one scale per row, and only the rows asked for are read."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        codes, scales = _quantized(table.weight, TABLE_MAX)
        self.register_buffer("codes", codes)  # (rows, d)
        self.register_buffer("scales", scales[:, None].contiguous())  # (rows, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        codes, scales = (self._rows(name, ids) for name in ("codes", "scales"))
        return codes.float() * scales

    def _rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        # Indexing would be exported as GatherND on a folded copy under another name.
        table: torch.Tensor = getattr(self, name)
        shape = (*ids.shape, table.shape[1])
        return ops.symbolic(
            "Gather", (table, ids), {"axis": 0}, dtype=table.dtype, shape=shape, version=21
        )


class Outputs(nn.Module):
    """The model with the outputs a device reads.

    A classifier gives logits (B, labels), any other encoder its last_hidden_state (B, T, d); both
    give sentence_embedding (B, d), the mean over a text's tokens at unit length.
    """

    def __init__(self, net: Any, *, classifies: bool) -> None:
        super().__init__()
        self.net, self.classifies = net, classifies

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        seen: list[torch.Tensor] = []
        hook = self.net.base_model.register_forward_hook(lambda *call: seen.append(call[2][0]))
        try:
            answer = self.net(**given)
        finally:
            hook.remove()
        hidden = seen[0]  # (B, T, d)
        first = answer.logits if self.classifies else hidden
        return first, sentence_embedding(hidden, attention_mask)


def sentence_embedding(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of (B, T, d) over each text's tokens, (B, d), at unit length."""
    kept = mask[..., None].to(hidden.dtype)  # (B, T, 1)
    mean = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1.0)
    return mean / (mean * mean).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


def quantize(net: Any) -> None:
    """Replace every linear layer and every large embedding of `net`, in place."""
    for name, module in list(net.named_modules()):
        new: nn.Module
        if isinstance(module, nn.Linear):
            new = Int8Linear(module)
        elif isinstance(module, nn.Embedding) and module.num_embeddings >= TABLE_ROWS_MIN:
            new = Int8Table(module)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, new)


@contextlib.contextmanager
def fused(net: Any) -> Iterator[None]:
    """Within this block `net` is traced with one operator per attention and per rotation.

    An architecture that does not ask transformers' table for its attention (MPNet) is left as is.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before = net.config._attn_implementation
    home = sys.modules[type(net).__module__]
    rotation = getattr(home, "apply_rotary_pos_emb", None)
    with contextlib.suppress(ValueError):
        net.set_attn_implementation(_NAME)
    if rotation is not None:
        setattr(home, "apply_rotary_pos_emb", _rotate)  # noqa: B010 - a module of transformers
    try:
        yield
    finally:
        if rotation is not None:
            setattr(home, "apply_rotary_pos_emb", rotation)  # noqa: B010
        with contextlib.suppress(ValueError):
            net.set_attn_implementation(before)


def _quantized(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = weight.detach().float()  # (out, in)
    scales = rows.abs().amax(1).clamp(min=1e-12) / largest  # (out,)
    return (rows / scales[:, None]).round().to(torch.int8), scales


def _operator(name: str, given: Any, settings: dict[str, Any], shape: Any) -> torch.Tensor:
    return ops.symbolic(
        f"com.microsoft::{name}", given, settings, dtype=torch.float32, shape=shape, version=1
    )


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """MultiHeadAttention over (B, heads, T, d) with an additive mask (B, 1, T, T)."""
    batch, heads, length, width = query.shape
    flat = [x.transpose(1, 2).reshape(batch, -1, heads * width) for x in (query, key, value)]
    settings = {"num_heads": heads, "scale": float(width**-0.5 if scaling is None else scaling)}
    given = (*flat, None, None, attention_mask)
    out = _operator("MultiHeadAttention", given, settings, (batch, length, heads * width))
    return out.view(batch, length, heads, width), None


def _rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RotaryEmbedding of (B, heads, T, d) from position 0; cos and sin are (1, T, d)."""
    batch, heads, length, width = query.shape
    start = torch.zeros(1, dtype=torch.int64)
    tables = [x[0, :, : width // 2] for x in (cos, sin)]  # (T, d / 2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        flat = x.transpose(1, 2).reshape(batch, length, heads * width)
        settings = {"num_heads": heads, "interleaved": 0}
        out = _operator("RotaryEmbedding", (flat, start, *tables), settings, flat.shape)
        return out.view(batch, length, heads, width).transpose(1, 2)

    return turn(query), turn(key)
