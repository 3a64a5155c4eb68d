"""Writes a trained LoRA adapter as the `.onnx_adapter` file that a bundle's LoRA inputs take.

Knows PEFT's factors, what a release claims and onnxruntime's adapter file. Does not know
training, graphs or signatures. Exporters write with it too, so that a device that gets a release as
a difference (`made_release.py`) writes the file that was signed: onnxruntime lays parameters out in
the order given, which is that of their names, and nothing else of the process shows in the bytes.
Another version of it may lay them out otherwise; hashes tell.

PEFT keeps A (r, in) and B (out, r) and computes y + (alpha / r) B A x. The graph computes
y + (x @ A') @ B': so A' = A^T (in, r) and B' = (alpha / r) B^T (r, out).

In onnxruntime-genai 0.18 an adapter belongs to a generator:

    adapters = og.Adapters(model); adapters.load(path, "name")
    generator.set_active_adapter(adapters, "name")   # before the first append_tokens

Tried: no call takes an adapter off again (the name "" is refused), and a second adapter on the
same generator replaces only the slots it has; the first one stays in the others. So one generator
has one adapter for life. A generator without set_active_adapter runs the base to the last bit, and
a new one costs no reload. `adapters.unload("name")` refuses while a generator still uses it.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import (
    ADAPTER_FILE,
    MANIFEST_FILE,
    FileEntry,
    ReleaseManifest,
    encode_manifest,
)

F32 = npt.NDArray[np.float32]

FORMAT_VERSION = 1
"""Written as the adapter's version; this module's layout of A and B."""


def write_release(
    out: Path,
    base: ReleaseManifest,
    factors: Mapping[str, npt.ArrayLike],
    *,
    release: str,
    rank: int,
    alpha: float,
    lineage: Mapping[str, str] | None = None,
) -> ReleaseManifest:
    """Write into the folder `out` the two files of an adapter release over `base`, an adapter of
    `factors` and a manifest, and return the latter.

    Raises:
        ExportError: as `write_adapter`.
        OSError: the disk refuses.
    """
    path = out / ADAPTER_FILE
    write_adapter(
        factors,
        rank=rank,
        alpha=alpha,
        slots=base.adapter_slots,
        path=path,
        rank_max=base.rank_max,
    )
    data = path.read_bytes()
    files = {ADAPTER_FILE: FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))}
    manifest = msgspec.structs.replace(
        base,
        release=release,
        kind="adapter",
        base_release=base.release,
        files=files,
        parity={},
        lineage={**(lineage or {}), "rank": str(rank), "alpha": str(float(alpha))},
    )
    (out / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    return manifest


def write_adapter(
    factors: Mapping[str, npt.ArrayLike],
    *,
    rank: int,
    alpha: float,
    slots: Mapping[str, tuple[int, int]],
    path: Path,
    rank_max: int = 1024,
) -> None:
    """Write `factors` to `path`.

    `factors` maps "<linear>.lora_A" to (r, in) and "<linear>.lora_B" to (out, r), both for each
    linear that is adapted; `slots` is the manifest's {linear: (out, in)}. Linears without factors
    keep their empty default.

    Raises:
        ExportError: a factor has no slot, no partner, another shape or a value that is not finite;
            or the rank is over `rank_max`; or `path` cannot be written.
    """
    from onnxruntime import AdapterFormat, OrtValue

    inputs = graph_inputs(factors, rank=rank, alpha=alpha, slots=slots, rank_max=rank_max)
    adapter = AdapterFormat()
    adapter.set_adapter_version(FORMAT_VERSION)
    adapter.set_model_version(FORMAT_VERSION)
    adapter.set_parameters({k: OrtValue.ortvalue_from_numpy(v) for k, v in inputs.items()})
    try:
        adapter.export_adapter(str(Path(path).resolve()))
    except (OSError, RuntimeError) as exc:
        raise ExportError(f"{path}: the adapter cannot be written ({exc})") from exc


def graph_inputs(
    factors: Mapping[str, npt.ArrayLike],
    *,
    rank: int,
    alpha: float,
    slots: Mapping[str, tuple[int, int]],
    rank_max: int = 1024,
) -> dict[str, F32]:
    """The graph inputs for PEFT-like `factors`: {"<linear>.lora_A": (in, r), ".lora_B": (r, out)}.

    Raises:
        ExportError: as `write_adapter`.
    """
    if not 1 <= rank <= rank_max:
        raise ExportError(f"rank {rank} is outside 1..{rank_max}, what this release takes")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ExportError(f"alpha {alpha} is not a positive number")
    if not factors:
        raise ExportError("the adapter has no factors; train one first")
    inputs: dict[str, F32] = {}
    for key in sorted(factors):
        linear, _, side = key.rpartition(".")
        if side not in ("lora_A", "lora_B") or linear not in slots:
            raise ExportError(
                f"the adapter's {key} fits no slot of the release; was it trained on another base?"
            )
        if f"{linear}.lora_A" not in factors or f"{linear}.lora_B" not in factors:
            raise ExportError(f"the adapter has only one of lora_A and lora_B for {linear}")
        value = np.asarray(factors[key], np.float32)
        out, width = slots[linear]
        wanted = (rank, width) if side == "lora_A" else (out, rank)
        if value.shape != wanted:
            raise ExportError(f"the adapter's {key} has shape {value.shape}, not {wanted}")
        if not np.isfinite(value).all():
            raise ExportError(f"the adapter's {key} has values that are not finite numbers")
        scale = np.float32(1.0 if side == "lora_A" else alpha / rank)
        inputs[key] = np.ascontiguousarray(value.T * scale)
    return inputs
