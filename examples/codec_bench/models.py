"""slm-b and slm-c as functions of frozen weights and of K clients' adapters at once.

Knows the two architectures' equations and LoRA. Does not know data, losses or training.

Eight clients share every frozen weight, so one matrix product serves them all; only the factors
differ, and a batched product serves those. The layers below the first adapted one never change, and
what they make of a text is computed once. Equal to transformers' models to float tolerance (tests).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

from edge_sdk.train import attention

Leaves = Mapping[str, torch.Tensor]
"""Trainable tensors by name, each (K, *shape): one for every client."""

LORA_SCALE = 2.0
"""alpha / r, as the product's adapters have it."""

DECODER_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
ENCODER_LINEARS = ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")


class Frozen:
    """The weights of one model, without gradients.

    Attributes:
        first: the first layer with an adapter; those below are frozen for good.
    """

    linears: tuple[str, ...]
    theta: float

    def __init__(self, folder: Path, *, adapted: int, dtype: torch.dtype) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.layers = int(self.config["num_hidden_layers"])
        self.first = self.layers - adapted
        self.heads = int(self.config["num_attention_heads"])
        self._dtype, self._angles = dtype, dict[int, tuple[torch.Tensor, torch.Tensor]]()
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: w.to(dtype).contiguous() for name, w in weights.items()}

    def adapter_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every factor: A (r, in), B (out, r)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.first, self.layers):
            for linear in self.linears:
                name = f"model.layers.{layer}.{linear}"
                out, into = self.weights[f"{name}.weight"].shape
                shapes[f"{name}.lora_A"], shapes[f"{name}.lora_B"] = (rank, into), (out, rank)
        return shapes

    def linear(self, x: torch.Tensor, name: str, leaves: Leaves | None) -> torch.Tensor:
        """W x + 2 B A x; x (K b, T, in), clients one after another."""
        y = x @ self.weights[f"{name}.weight"].T
        if leaves is None or f"{name}.lora_A" not in leaves:
            return y
        A, B = leaves[f"{name}.lora_A"], leaves[f"{name}.lora_B"]  # (K, r, in), (K, out, r)
        inner = torch.bmm(x.reshape(len(A), -1, x.shape[-1]), A.transpose(1, 2))  # (K, b T, r)
        by_client = y.view(len(A), -1, y.shape[-1])
        return torch.baddbmm(by_client, inner, B.transpose(1, 2), alpha=LORA_SCALE).view(y.shape)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions; x (B, heads, T, head width)."""
        cos, sin = self._turns(x.shape[-2], x.shape[-1])
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def _turns(self, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        if tokens not in self._angles:
            rates = self.theta ** -(torch.arange(0, width, 2).float() / width)
            angles = torch.outer(torch.arange(tokens).float(), rates)
            self._angles[tokens] = angles.cos().to(self._dtype), angles.sin().to(self._dtype)
        return self._angles[tokens]

    def by_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) as (B, T, heads, head width)."""
        return x.view(*x.shape[:2], self.heads, -1)

    def layer(
        self, h: torch.Tensor, index: int, leaves: Leaves | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """One layer; h (B, T, width)."""
        raise NotImplementedError

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids as (B, T, width)."""
        raise NotImplementedError

    @torch.no_grad()
    def below(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the layers without adapters make of ids (B, T): (B, T, width)."""
        parts = []
        for start in range(0, len(ids), 64):
            rows = slice(start, start + 64)
            h = self.embed(ids[rows])
            for index in range(self.first):
                h = self.layer(h, index, None, None if mask is None else mask[rows])
            parts.append(h)
        return torch.cat(parts)


class Decoder(Frozen):
    """Qwen3 as slm-b has it: RMS norms, normed queries and keys, SwiGLU, tied embedding."""

    linears = DECODER_LINEARS

    def __init__(self, folder: Path, *, adapted: int, dtype: torch.dtype) -> None:
        super().__init__(folder, adapted=adapted, dtype=dtype)
        self.theta = float(self.config["rope_parameters"]["rope_theta"])
        self.eps = float(self.config["rms_norm_eps"])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """As `Frozen.embed`."""
        return self.weights["model.embed_tokens.weight"][ids]

    def layer(
        self, h: torch.Tensor, index: int, leaves: Leaves | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As `Frozen.layer`; every token sees those before it."""
        at = f"model.layers.{index}."
        x = self._norm(h, f"{at}input_layernorm")
        q, k, v = (self.by_heads(self.linear(x, f"{at}self_attn.{n}_proj", leaves)) for n in "qkv")
        q = self.rotated(self._norm(q, f"{at}self_attn.q_norm").transpose(1, 2))
        k = self.rotated(self._norm(k, f"{at}self_attn.k_norm").transpose(1, 2))
        bias = attention.past(h.shape[1], h.dtype, h.device)
        seen = attention.plain(q * q.shape[-1] ** -0.5, k, v.transpose(1, 2), bias)
        h = h + self.linear(seen.transpose(1, 2).reshape(h.shape), f"{at}self_attn.o_proj", leaves)
        x = self._norm(h, f"{at}post_attention_layernorm")
        gate = functional.silu(self.linear(x, f"{at}mlp.gate_proj", leaves))
        up = self.linear(x, f"{at}mlp.up_proj", leaves)
        return h + self.linear(gate * up, f"{at}mlp.down_proj", leaves)

    def token_losses(
        self, h: torch.Tensor, targets: torch.Tensor, leaves: Leaves | None
    ) -> torch.Tensor:
        """Cross-entropy in nats (B T,) of target ids (B, T), from the output of `below`."""
        for index in range(self.first, self.layers):
            h = self.layer(h, index, leaves, None)
        states = self._norm(h, "model.norm").reshape(-1, h.shape[-1])
        found: torch.Tensor = _TokenLosses.apply(
            states, self.weights["model.embed_tokens.weight"], targets.reshape(-1)
        )
        return found

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.eps)


class Encoder(Frozen):
    """ModernBERT as slm-c has it: layer norms without bias, GeGLU, every token sees every token."""

    linears = ENCODER_LINEARS

    def __init__(self, folder: Path, *, adapted: int, dtype: torch.dtype) -> None:
        super().__init__(folder, adapted=adapted, dtype=dtype)
        self.theta = float(self.config["rope_parameters"]["full_attention"]["rope_theta"])
        self.eps = float(self.config["norm_eps"])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """As `Frozen.embed`."""
        found = self.weights["model.embeddings.tok_embeddings.weight"][ids]
        return self._norm(found, "model.embeddings.norm")

    def layer(
        self, h: torch.Tensor, index: int, leaves: Leaves | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As `Frozen.layer`; `mask` (B, T) is True where a token is no padding."""
        assert mask is not None, "an encoder's texts are padded"
        at = f"model.layers.{index}."
        x = self._norm(h, f"{at}attn_norm") if index else h
        parts = self.linear(x, f"{at}attn.Wqkv", leaves).chunk(3, dim=-1)
        q, k, v = (self.by_heads(part).transpose(1, 2) for part in parts)
        q, bias = self.rotated(q), attention.bias_of(mask[:, None, None, :], h.dtype)
        seen = attention.plain(q * q.shape[-1] ** -0.5, self.rotated(k), v, bias)
        h = h + self.linear(seen.transpose(1, 2).reshape(h.shape), f"{at}attn.Wo", leaves)
        x = self._norm(h, f"{at}mlp_norm")
        into, gate = self.linear(x, f"{at}mlp.Wi", leaves).chunk(2, dim=-1)
        return h + self.linear(functional.gelu(into) * gate, f"{at}mlp.Wo", leaves)

    def states(self, h: torch.Tensor, mask: torch.Tensor, leaves: Leaves | None) -> torch.Tensor:
        """The last layer's output (B, T, width) from the output of `below`."""
        for index in range(self.first, self.layers):
            h = self.layer(h, index, leaves, mask)
        return self._norm(h, "model.final_norm")

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], None, self.eps
        )


CHUNK = 128
"""Tokens whose logits are held at once: 2 MiB of float32 for 4096 words, which a cache keeps."""


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy over a frozen vocabulary (V, width) of states (n, width).

    As the vocabulary needs no gradient, that of the states, (p - onehot) V, is computed with the
    loss and the logits are forgotten: a third of the time of doing it in two passes over memory.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, vocabulary: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        losses = torch.empty(len(states))
        grads = torch.empty_like(states)
        for start in range(0, len(states), CHUNK):
            rows = slice(start, start + CHUNK)
            p = torch.softmax((states[rows] @ vocabulary.T).float(), dim=1)  # (chunk, V)
            found = p.gather(1, targets[rows, None])
            losses[rows] = -found[:, 0].clamp_min(1e-30).log()
            if ctx.needs_input_grad[0]:
                p.scatter_(1, targets[rows, None], found - 1)
                grads[rows] = p.to(states.dtype) @ vocabulary
        ctx.save_for_backward(grads)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grads,) = ctx.saved_tensors
        return grads * outer[0][:, None].to(grads.dtype), None, None
