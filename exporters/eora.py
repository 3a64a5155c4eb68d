"""Calibrates a bundle's EoRA branch on text and writes it as an adapter release of that bundle.

Knows bundles, the model folder they were made from, and `compression.eora_torch`. Does not know how
the branch is computed, nor how devices choose an adapter.

The branch fills the LoRA slots that the graph has anyway. Without the adapter the bundle computes
what it computed before, to the last bit; a generator without it needs no reload. A task adapter on
top is one adapter of both, `compression.eora.concatenate((branch, 1.0), (task, alpha / rank))`.

Four of five windows of the text calibrate; every fifth only measures. What is measured is how far
the next-token distribution is from the uncompressed model's (Kullback-Leibler, nats per token) and
the loss. A branch that does not bring the distribution nearer is not written.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compression.eora import Factors
from compression.errors import WeightsError
from edge_sdk.adapter_file import graph_inputs
from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import ReleaseManifest
from exporters.bundle import read_manifest, write_adapter_release
from exporters.parity import empty_cache_feed, open_session, relative

logger = logging.getLogger(__name__)

F64 = npt.NDArray[np.float64]

LENGTH = 256
"""Tokens of a window; less when the text or the context is short."""
LEAST_LENGTH = 16
BATCH = 8
WINDOWS = 40
"""Windows used of a longer text: about 8,000 tokens calibrate. The paper's gains end near 128
sequences of a model two thousand times as large."""
CHECK_EVERY = 5
FOREIGN = 0.5
"""|W - Wq| / |W| above which the bundle was made from other weights: int4 loses about 0.1."""
LOGIT_ERROR = 0.02
"""Largest relative difference between ONNX Runtime and torch with the branch, as in the export."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Measured on windows that did not calibrate.

    kl_*: nats per token from the uncompressed model; loss_*: nats per token, `loss_original` being
    the uncompressed model's. `logit_error`: ONNX Runtime against torch, both with the branch.
    """

    kl_before: float
    kl_after: float
    loss_original: float
    loss_before: float
    loss_after: float
    logit_error: float
    calibration_tokens: int
    held_out_tokens: int


def export_eora(
    bundle_dir: Path,
    model_dir: Path,
    out: Path,
    *,
    release: str,
    texts: Sequence[str],
    rank: int = 8,
) -> tuple[ReleaseManifest, Figures]:
    """Calibrate the bundle in `bundle_dir` on `texts` and write adapter release `release` to `out`.

    `model_dir` is the Hugging Face folder that the bundle was exported from. The whole model is
    held twice in float32.

    Raises:
        ExportError: the two folders do not belong together, too little text, a rank the bundle
            does not take, no gain on held-back text, or ONNX Runtime disagrees with torch.
    """
    manifest = read_manifest(bundle_dir)
    if not manifest.adapter_slots or manifest.kind == "adapter":
        raise ExportError(f"{bundle_dir} has no adapter slots; give a decoder's whole bundle")
    if not 1 <= rank <= manifest.rank_max:
        raise ExportError(f"rank {rank} is outside 1..{manifest.rank_max}, what this release takes")
    rows = windows(bundle_dir, texts, context=manifest.context)
    checked = np.arange(len(rows)) % CHECK_EVERY == CHECK_EVERY - 1
    try:
        original, bundle, errors = load_both(bundle_dir, model_dir, manifest)
        factors = calibrate_bundle(bundle, errors, rows[~checked], rank=rank)
    except WeightsError as exc:
        raise ExportError(f"{bundle_dir} cannot be calibrated: {exc}") from exc
    figures = _measure(bundle_dir, manifest, original, bundle, factors, rows, checked, rank=rank)
    if not figures.kl_after < figures.kl_before:
        raise ExportError(
            f"the branch does not help: on held-back text the uncompressed model is "
            f"{figures.kl_after:.5f} nats per token away with it, {figures.kl_before:.5f} without; "
            f"give more text ({figures.calibration_tokens} tokens were used) or none of this"
        )
    found = write_adapter_release(
        out,
        manifest,
        factors,
        release=release,
        rank=rank,
        alpha=float(rank),
        lineage={
            "method": "eora",
            "calibration_tokens": str(figures.calibration_tokens),
            "kl_before": f"{figures.kl_before:.6f}",
            "kl_after": f"{figures.kl_after:.6f}",
        },
    )
    logger.info("eora %s for %s: %s", release, manifest.release, figures)
    return found, figures


def windows(bundle_dir: Path, texts: Sequence[str], *, context: int) -> npt.NDArray[np.int64]:
    """Token ids (n, T) of the texts in a row, CHECK_EVERY <= n <= WINDOWS.

    Raises:
        ExportError: not enough text for CHECK_EVERY windows of LEAST_LENGTH tokens.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle_dir / "tokenizer.json"))
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text + "\n", add_special_tokens=False).ids
        if len(ids) >= WINDOWS * LENGTH:
            break
    length = min(LENGTH, context or LENGTH, len(ids) // CHECK_EVERY)
    if length < LEAST_LENGTH:
        raise ExportError(
            f"the calibration text has {len(ids)} tokens; at least {CHECK_EVERY * LEAST_LENGTH} "
            "are needed, and some thousand are better"
        )
    count = min(WINDOWS, len(ids) // length)
    return np.asarray(ids[: count * length], np.int64).reshape(count, length)


def load_both(
    bundle_dir: Path, model_dir: Path, manifest: ReleaseManifest
) -> tuple[Any, Any, dict[str, F64]]:
    """The uncompressed model, the bundle's, both torch float32, and D of every slot's layer.

    Raises:
        ExportError: no model there, or not the one that the bundle was made from.
        WeightsError: the bundle's weights cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from compression.int4_torch import load_slm

    try:
        original = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, local_files_only=True
        ).eval()
    except (OSError, ValueError) as exc:
        raise ExportError(f"{model_dir} is not a model folder: {exc}") from exc
    bundle = load_slm(bundle_dir, dtype=torch.float32)
    errors: dict[str, F64] = {}
    for name in manifest.adapter_slots:
        try:
            W, Wq = (
                m.get_submodule(name).weight.detach().double().numpy() for m in (original, bundle)
            )
        except AttributeError as exc:
            raise ExportError(f"{model_dir} has no layer {name}, which the bundle has") from exc
        if W.shape != Wq.shape or not np.linalg.norm(W - Wq) < FOREIGN * np.linalg.norm(W):
            raise ExportError(
                f"{bundle_dir} was not made from {model_dir}: {name} has other weights; "
                "give the folder that was exported"
            )
        errors[name] = W - Wq
    return original, bundle, errors


def calibrate_bundle(
    bundle: Any, errors: dict[str, F64], rows: npt.NDArray[np.int64], *, rank: int
) -> Factors:
    """The branch of every layer of `errors` from token ids `rows` (n, T)."""
    import torch

    from compression.eora_torch import calibrate

    batches = list(torch.from_numpy(rows).split(BATCH))
    return calibrate(bundle, batches, errors, lambda name, _layer, _C: errors[name], rank=rank)


def _measure(
    bundle_dir: Path,
    manifest: ReleaseManifest,
    original: Any,
    bundle: Any,
    factors: Factors,
    rows: npt.NDArray[np.int64],
    checked: npt.NDArray[np.bool_],
    *,
    rank: int,
) -> Figures:
    import torch

    from compression.eora_torch import branches_on

    held = torch.from_numpy(rows[checked])
    kl_before, loss_original, loss_before = _distance(original, bundle, held)
    with branches_on(bundle, factors):
        kl_after, _, loss_after = _distance(original, bundle, held)
        with torch.inference_mode():
            expected = bundle(held[:1]).logits[0].numpy()
    session, ids = open_session(bundle_dir), rows[checked][:1]
    inputs = graph_inputs(
        factors, rank=rank, alpha=float(rank), slots=manifest.adapter_slots,
        rank_max=manifest.rank_max,
    )  # fmt: skip
    found = session.run(["logits"], empty_cache_feed(bundle_dir, session, ids) | inputs)[0][0]
    error = relative(_centred(found), _centred(expected))
    if not error <= LOGIT_ERROR:
        raise ExportError(
            f"with the branch, ONNX Runtime disagrees with torch: relative logit error "
            f"{error:.4f}, limit {LOGIT_ERROR}; export the bundle again"
        )
    sizes = (int((~checked).sum()) * rows.shape[1], int(held.numel()))
    return Figures(kl_before, kl_after, loss_original, loss_before, loss_after, error, *sizes)


def _centred(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    centred: npt.NDArray[np.float32] = logits - logits.mean(-1, keepdims=True)
    return centred


def _distance(original: Any, bundle: Any, held: Any) -> tuple[float, float, float]:
    # Kullback-Leibler from the original, the original's loss, the bundle's: nats per token.
    import torch
    from torch.nn import functional

    totals = np.zeros(3)
    with torch.inference_mode():
        for ids in held.split(2):
            p, q = (
                torch.log_softmax(m(input_ids=ids, use_cache=False).logits[:, :-1].float(), -1)
                for m in (original, bundle)
            )
            wanted = ids[:, 1:].flatten()
            totals += (
                float(functional.kl_div(q, p, log_target=True, reduction="sum")),
                *(
                    float(functional.nll_loss(x.flatten(0, 1), wanted, reduction="sum"))
                    for x in (p, q)
                ),
            )
    kl, original_loss, loss = totals / max(1, held.numel() - len(held))
    if not math.isfinite(kl):
        raise ExportError("the models' probabilities are not finite numbers; export again")
    return float(kl), float(original_loss), float(loss)
