"""Attention as training needs it: plain products up to a width, torch's fused kernel beyond.

Knows transformers' table of attention functions. Does not know models, LoRA or tasks.

torch's fused attention has a slow backward pass on CPUs, and its plain fallback computes 16-bit
inputs in 32 bits. Written as two products and a softmax in the inputs' own type, with query heads
that share keys taken as more rows of one product, attention takes a quarter of either's time in
bfloat16 and no more in float32 (DECISIONS 72). The price is that the probabilities are kept, which
grows with the square of the width; so the width decides, at each call.
"""

import functools
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "symbiont_training"

SHORT_TOKENS = 512
"""Up to this width attention is computed the plain way. There its probabilities are a third of all
that a 135 M model keeps for its backward pass; at four times the width they would be two thirds."""

_PLAIN = frozenset({"position_ids", "use_cache", "cache_position", "sliding_window"})
"""What models pass to attention functions that changes nothing here: masks hold what it says."""


def use(model: Any) -> None:
    """Have `model` take this attention wherever it would take torch's; others keep theirs."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query (B, H, T, D) to key and value (B, K, T, D), as (B, T, H, D); K divides H.

    `attention_mask` is boolean (B or 1, 1, T, T), True where seen, or None: then all is seen, or
    the past where the module is causal. Without gradients, and beyond SHORT_TOKENS, it is torch's.
    """
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    known = all(v is None or v is False or k in _PLAIN for k, v in kwargs.items())
    short = query.shape[2] == key.shape[2] <= SHORT_TOKENS
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if not (wanted and known and short and boolean) or dropout:
        seen: torch.Tensor
        seen, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return seen, None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = None
    if attention_mask is not None:
        bias = bias_of(attention_mask, query.dtype)
    elif causal:
        bias = past(query.shape[2], query.dtype, query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plain(query * scale, key, value, bias).transpose(1, 2), None


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Attention (B, H, T, D) of scaled queries; `bias` broadcasts over the scores (B, H, T, T)."""
    batch, heads, width, size = query.shape
    shared = batch * key.shape[1]
    rows = query.reshape(shared, -1, size)  # (B K, H/K T, D)
    scores = torch.bmm(rows, key.reshape(shared, width, size).mT)
    if bias is not None:
        scores.view(batch, heads, width, width).add_(bias)
    probabilities = torch.softmax(scores, dim=-1)
    seen = torch.bmm(probabilities, value.reshape(shared, width, -1))
    return seen.view(batch, heads, width, -1)


def bias_of(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bias of a boolean mask, True where a query sees a key."""
    hidden = ~seen
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, _never(dtype))


def _never(dtype: torch.dtype) -> float:
    # Finite, so that a row which may see nothing gives numbers; half, so that a score fits on top.
    return torch.finfo(dtype).min / 2


@functools.lru_cache(maxsize=64)
def past(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The bias (width, width) with which every token sees itself and those before it."""
    return torch.full((width, width), _never(dtype), dtype=dtype, device=device).triu(1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
