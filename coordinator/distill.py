"""Makes a better small model out of synthetic texts and soft labels, and writes it out whole.

Knows the twin's adapter, soft targets and Hugging Face folders. Does not know who wrote the texts,
ONNX, or how a release is signed.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from coordinator.twin import Twin
from edge_sdk.errors import ExportError, LocalProtocolError
from edge_sdk.train.lora import A_SUFFIX, B_SUFFIX, Factors, LoraSpec
from edge_sdk.train.text_task import word_log_probs
from edge_sdk.train.trainer import optimize, shuffled_batches

logger = logging.getLogger(__name__)

F32 = npt.NDArray[np.float32]


def sharpen(probs: F32, temperature: float) -> F32:
    """Rows proportional to probs^(1/temperature); below 1 sharper, above 1 softer."""
    powered = np.power(np.maximum(probs, 1e-9), 1.0 / temperature)
    result: F32 = (powered / powered.sum(axis=1, keepdims=True)).astype(np.float32)
    return result


def distil(
    twin: Twin,
    texts: Sequence[str],
    targets: F32,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    weights: Sequence[float] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> float:
    """Move the twin's global factors towards soft labels `targets` (n, labels); last loss.

    The loss is -sum_j q_j log p(word_j | prompt(x)), over the whole vocabulary, so the student
    learns to answer with label words as well as which one. With no texts or steps nothing changes.

    Raises:
        LocalProtocolError: texts and targets do not pair up.
        FleetError: the loss is no longer a number; lower lr.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2; soft-label option of PAPERS.md 1 (b).
    """
    if targets.shape != (len(texts), len(twin.reader.words)):
        raise LocalProtocolError(
            f"targets {targets.shape} do not fit {len(texts)} texts "
            f"and {len(twin.reader.words)} labels"
        )
    if not texts or steps == 0:
        return 0.0
    twin.adapter.load(twin.factors)
    prompts = twin.reader.prompts(texts)
    wanted = torch.from_numpy(np.ascontiguousarray(targets, dtype=np.float32))
    share = torch.ones(len(texts)) if weights is None else torch.tensor(list(weights)).float()
    rows_of_step = shuffled_batches(len(texts), batch, seed=seed)

    def loss_of_step() -> torch.Tensor:
        rows = next(rows_of_step)
        log_p = word_log_probs(twin.adapter.model, twin.reader, [prompts[i] for i in rows])
        each = -(wanted[rows] * log_p).sum(dim=1)  # (B,)
        return (each * share[rows]).sum() / share[rows].sum().clamp(min=1e-6)

    last = 0.0
    for done, last in enumerate(optimize(twin.adapter, loss_of_step, steps=steps, lr=lr), 1):
        if progress is not None:
            progress(done, steps, last)
    twin.set_global(twin.adapter.factors())
    return last


def merge(model_dir: Path, factors: Mapping[str, F32], spec: LoraSpec, out: Path) -> Path:
    """Write to `out` the Hugging Face folder `model_dir` with W + (alpha/r) B·A merged in.

    The original 16- or 32-bit weights are merged, not the int4 ones, so that quantizing the result
    rounds once. Sums are taken in float64 and stored in the weights' own type.

    Raises:
        ExportError: no safetensors weights there, or a factor's layer is not among them.
    """
    out.mkdir(parents=True, exist_ok=True)
    pending = {key[: -len(A_SUFFIX)] for key in factors if key.endswith(A_SUFFIX)}
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ExportError(f"{model_dir} holds no .safetensors weights to merge an adapter into")
    for path in model_dir.iterdir():
        if path.is_file() and path.suffix in {".json", ".txt", ".model", ".jinja"}:
            shutil.copyfile(path, out / path.name)
    for path in files:
        weights = load_file(path)
        for slot in sorted(pending):
            name = slot + ".weight"
            if name not in weights:
                continue
            change = spec.scale * _product(factors, slot)
            if change.shape != tuple(weights[name].shape):
                raise ExportError(
                    f"{slot}: adapter of shape {change.shape} does not fit "
                    f"weight {tuple(weights[name].shape)} in {path}"
                )
            whole = weights[name].double() + torch.from_numpy(change)
            weights[name] = whole.to(weights[name].dtype)
            pending.discard(slot)
        save_file(weights, out / path.name, {"format": "pt"})
    if pending:
        raise ExportError(f"{model_dir} has no weight for {sorted(pending)[0]}; wrong base model?")
    logger.info("merged an adapter of rank %d into %d files", spec.rank, len(files))
    return out


def _product(factors: Factors | Mapping[str, F32], slot: str) -> npt.NDArray[np.float64]:
    A = factors[slot + A_SUFFIX].astype(np.float64)
    B = factors[slot + B_SUFFIX].astype(np.float64)
    result: npt.NDArray[np.float64] = B @ A
    return result
