"""How likely a model finds given tokens, without ever holding the logits of all its words.

Knows a language model's head, packed or not, and how softmax and its gradient add up piece by
piece. Does not know tasks, prompts or LoRA.

For n places and V words, logits take 16 n V bytes with what autograd keeps of them, most of a
step's memory when every token is predicted, and passing over them takes as long as the layers of a
small model. The gradient of log p_t in the hidden state h is (1 - p_t) W_t - sum of p_j W_j over
the other words, so it can be added up along with the softmax itself: each piece of the head is
multiplied by twice while it is at hand, dequantized once, and nothing is kept but a vector a place.

Source: the running maximum and sum are those of Milakov and Gimelshein 2018 (arXiv 1805.02867);
weighting rows by them along the way is FlashAttention's (arXiv 2205.14135), with h for the query
and W for keys and values.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from compression.int4_layers import TILE_WEIGHTS, Int4Linear

ASKED = 4
"""Tokens for which a model is asked what it makes of its head."""

MAGNIFIED = 1000.0
"""Hidden states are made so many times larger for it: a cap on logits must not go unseen."""

_plain_heads: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


def is_plain(model: Any) -> bool:
    """Whether the model's logits are its hidden states times its head's frozen weight, no more.

    Found by asking it once, and remembered.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or any(p.requires_grad for p in head.parameters()):
        return False
    if model not in _plain_heads:
        _plain_heads[model] = _asked(model, head)
    return _plain_heads[model]


def log_probs(
    model: Any, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Log-probability (n,) float32 of `tokens[j]` after token `columns[j]` of row `rows[j]`.

    `ids` is (B, T) int64, the others (n,) int64; the model `is_plain`.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False)[0][rows, columns]  # (n, hidden)
    found: torch.Tensor = _LogProbs.apply(hidden, model.get_output_embeddings(), tokens)
    return found


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: nn.Linear, tokens: torch.Tensor
    ) -> torch.Tensor:
        n, ctx.dtype = len(tokens), hidden.dtype
        reach = torch.full((n, 1), -torch.inf)  # log of the sum of e^z, so far
        own = torch.zeros(n, 1)
        pull = torch.zeros(hidden.shape) if ctx.needs_input_grad[0] else None  # sum of p_j W_j
        for start, piece in _pieces(head, hidden.dtype):
            z = torch.mm(hidden, piece).float()  # (n, words)
            here = ((tokens >= start) & (tokens < start + z.shape[1])).nonzero()[:, 0]
            own[here, 0] = z[here, tokens[here] - start]
            p = torch.softmax(z, dim=1)  # of this piece alone: quicker than torch.exp
            more = z.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
            further = torch.logaddexp(reach, more)
            if pull is not None:
                p[here, tokens[here] - start] = 0
                part = torch.mm(p.to(hidden.dtype), piece.T).float()  # (n, hidden)
                pull.mul_((reach - further).exp_()).addcmul_(part, (more - further).exp_())
            reach = further
        found = own - reach
        if pull is not None:
            # The token itself is left out of the sum: of a likely one the rest is a small
            # difference, and would drown in its rounding.
            ctx.save_for_backward(_rows(head, tokens).mul_(-found.expm1()).sub_(pull))
        return found[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (pull,) = ctx.saved_tensors
        return (pull * grads[0][:, None]).to(ctx.dtype), None, None


def _pieces(head: nn.Linear, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    # Each (hidden, words), with the number of its first word; to be used before the next.
    if isinstance(head, Int4Linear):
        for i in range(head.tiles.count):
            yield head.tiles.span(i)[0], head.tiles.tile(i, dtype)
        return
    step = max(1, TILE_WEIGHTS // head.in_features)
    for start in range(0, head.out_features, step):
        yield start, head.weight[start : start + step].T


def _rows(head: nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    if isinstance(head, Int4Linear):
        return head.tiles.rows(tokens, head.dtype).float()
    return head.weight[tokens].float()


def _asked(model: Any, head: nn.Linear) -> bool:
    if head.bias is not None:
        return False
    ids = torch.linspace(1, head.out_features - 1, ASKED)[None].long()
    seen: list[torch.Tensor] = []

    def magnify(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        seen.append(inputs[0])
        return (inputs[0] * MAGNIFIED,)

    hooks = [
        head.register_forward_pre_hook(magnify),
        head.register_forward_hook(lambda _module, _inputs, found: seen.append(found)),
    ]
    try:
        with torch.no_grad():
            said = model(input_ids=ids, use_cache=False).logits
            hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    finally:
        for hook in hooks:
            hook.remove()
    return bool(said.any()) and torch.equal(said, seen[1]) and torch.equal(hidden, seen[0])
