"""LoRA factors: attached to a model, read, written, compared and packed for the wire.

Knows peft's layers, factor names and shapes. Does not know tasks, batches or aggregation. Factors
alone need no torch: it is loaded with the model that they are attached to.

A layer W of shape (out, in) becomes W + (alpha / r) * B·A with A (r, in) and B (out, r).
Factors are a plain dict of float32 arrays named after the Hugging Face module:
"model.layers.0.self_attn.q_proj.lora_A" and "....lora_B".
Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from compression import tensor_file
from compression.errors import CodecError
from edge_sdk.errors import ConfigError, RemoteProtocolError

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]
Factors = dict[str, F32]
Layout = dict[str, tuple[int, int]]

A_SUFFIX, B_SUFFIX = ".lora_A", ".lora_B"
_ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What decides an adapter's shape: rank r, alpha, and the target modules' last names."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor before B·A."""
        return self.alpha / self.rank


class Adapter:
    """LoRA layers inside one model; the model is changed in place, its weights stay frozen.

    Attributes:
        model: the model with LoRA layers in it.
        spec: rank, alpha and targets.
        layout: shape of every factor, in sorted order.

    Raises:
        ConfigError: no module of the model has one of the target names.
    """

    def __init__(self, model: Any, spec: LoraSpec) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        from edge_sdk.train import attention

        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=list(spec.targets),
            lora_dropout=0.0,
            bias="none",
        )
        model.requires_grad_(False)
        try:
            inject_adapter_in_model(config, model, _ADAPTER)
        except ValueError as exc:
            raise ConfigError(
                f"LoRA targets {', '.join(spec.targets)} do not fit this model: {exc}"
            ) from exc
        attention.use(model)
        self.model, self.spec = model, spec
        self._layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        self._parameters: dict[str, torch.nn.Parameter] = {}
        for name, module in model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            for suffix, inner in ((A_SUFFIX, module.lora_A), (B_SUFFIX, module.lora_B)):
                # Small steps vanish in 16 bits, so factors are trained in 32 on any base.
                weight = inner[_ADAPTER].float().weight
                weight.requires_grad_(True)
                self._parameters[name + suffix] = weight
        self._parameters = dict(sorted(self._parameters.items()))
        self.layout: Layout = {
            key: (weight.shape[0], weight.shape[1]) for key, weight in self._parameters.items()
        }

    def parameters(self) -> "list[torch.nn.Parameter]":
        """The trainable factors, in layout order."""
        return list(self._parameters.values())

    def factors(self) -> Factors:
        """A copy of the factors as they are now."""
        return {
            key: weight.detach().numpy().astype(np.float32, copy=True)
            for key, weight in self._parameters.items()
        }

    def load(self, factors: Mapping[str, F32]) -> None:
        """Put `factors` in place of the present ones; nothing else of the model is touched.

        Raises:
            RemoteProtocolError: names or shapes are not those of this model.
        """
        import torch

        check_layout(factors, self.layout)
        with torch.no_grad():
            for key, weight in self._parameters.items():
                weight.copy_(torch.from_numpy(np.ascontiguousarray(factors[key])))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this block the model is the plain base."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)
            for weight in self._parameters.values():
                weight.requires_grad_(True)


def start_factors(layout: Mapping[str, tuple[int, int]], seed: int) -> Factors:
    """The zero adapter: B = 0 and A uniform in ±1/sqrt(in), the same on every machine.

    Values are representable in float16, so sending them changes nothing.
    """
    rng = np.random.default_rng(seed)
    factors: Factors = {}
    for key in sorted(layout):
        shape = layout[key]
        if key.endswith(A_SUFFIX):
            bound = 1.0 / math.sqrt(shape[1])
            factors[key] = rng.uniform(-bound, bound, shape).astype(np.float16).astype(np.float32)
        else:
            factors[key] = np.zeros(shape, np.float32)
    return factors


def delta(new: Mapping[str, F32], old: Mapping[str, F32]) -> Factors:
    """new - old, factor by factor.

    Raises:
        RemoteProtocolError: the two have different names or shapes.
    """
    check_layout(new, layout_of(old))
    return {key: new[key] - old[key] for key in sorted(old)}


def add(old: Mapping[str, F32], change: Mapping[str, F32]) -> Factors:
    """old + change, factor by factor.

    Raises:
        RemoteProtocolError: the two have different names or shapes.
    """
    check_layout(change, layout_of(old))
    return {key: old[key] + change[key] for key in sorted(old)}


def layout_of(factors: Mapping[str, F32]) -> Layout:
    """Shape of every factor."""
    return {key: (value.shape[0], value.shape[1]) for key, value in sorted(factors.items())}


def check_layout(factors: Mapping[str, F32], layout: Mapping[str, tuple[int, int]]) -> None:
    """Refuse factors that do not belong to `layout`.

    Raises:
        RemoteProtocolError: a factor is missing, unknown or of another shape.
    """
    for key in sorted(set(factors) ^ set(layout)):
        where = "unknown" if key in factors else "missing"
        raise RemoteProtocolError(
            f"adapter factor {key} is {where}; the adapter is for another model"
        )
    for key, shape in layout.items():
        if tuple(factors[key].shape) != tuple(shape):
            raise RemoteProtocolError(
                f"adapter factor {key} has shape {tuple(factors[key].shape)}, "
                f"expected {tuple(shape)}"
            )


def to_bytes(factors: Mapping[str, F32]) -> bytes:
    """A safetensors blob of float16 factors.

    Raises:
        RemoteProtocolError: a value does not fit float16.
    """
    packed: dict[str, npt.NDArray[np.float16]] = {}
    for key in sorted(factors):
        with np.errstate(over="ignore"):
            packed[key] = np.ascontiguousarray(factors[key]).astype(np.float16)
        if not np.isfinite(packed[key]).all():
            raise RemoteProtocolError(f"adapter factor {key} holds values beyond float16")
    data: bytes = save(packed)
    return data


def from_bytes(data: bytes) -> Factors:
    """The factors of a blob made by `to_bytes`.

    Raises:
        RemoteProtocolError: not such a blob, or it holds something else than finite matrices.
    """
    try:
        tensors, _ = tensor_file.read(data)
    except CodecError as exc:
        raise RemoteProtocolError(f"not an adapter: {exc}") from exc
    for key, value in tensors.items():
        if value.ndim != 2 or value.dtype != np.float16 or not np.isfinite(value).all():
            raise RemoteProtocolError(f"adapter factor {key} is not a finite float16 matrix")
    return {key: tensors[key].astype(np.float32) for key in sorted(tensors)}


def wire_exact(factors: Mapping[str, F32]) -> Factors:
    """The factors as the other side will read them, after float16."""
    return from_bytes(to_bytes(factors))
