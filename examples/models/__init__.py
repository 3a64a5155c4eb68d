"""The example models: int8 weights in this folder, unfolded into Hugging Face folders on demand.

Knows how weights are stored; does not know how they were trained (examples/pretrain.py).
"""

import hashlib
import lzma
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load, save, save_file

WEIGHTS = "model.int8.safetensors.xz"
SUMS = "SHA256SUMS"
_HERE = Path(__file__).resolve().parent
_SCALE = ".scale"
# Codes use -63..63 of the int8 range: xz then stores them in a fifth less than the full range, and
# the bits per byte of slm-a on WikiText-2 moved by 0.0001.
_CODE_MAX = 63
_SMALLEST_SCALE = 1e-6  # a row of zeros still needs a scale that float16 can hold


class ModelError(ValueError):
    """An example model is unknown, or its stored files are damaged."""


def known(folder: Path = _HERE) -> list[str]:
    """Names of the stored models."""
    return sorted(path.parent.name for path in folder.glob(f"*/{WEIGHTS}"))


def cache_folder() -> Path:
    """Where unfolded models go: $SYMBIONT_CACHE, else ~/.cache/symbiont/models."""
    chosen = os.environ.get("SYMBIONT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "symbiont" / "models"


def materialize(name: str, cache: Path | None = None, *, models: Path = _HERE) -> Path:
    """The Hugging Face folder of model `name`, written on first use and reused after.

    The folder's name carries the sum of the stored files, so a retrained model never meets an old
    copy.  Weights come out as float32.  Raises: ModelError.
    """
    stored = models / name
    if not (stored / WEIGHTS).is_file():
        raise ModelError(f"unknown example model {name!r}; known: {', '.join(known(models))}")
    digest = _verify(stored)
    unfolded = (cache or cache_folder()) / f"{name}-{digest[:16]}"
    if unfolded.is_dir():
        return unfolded
    unfolded.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=unfolded.parent))
    try:
        for path in stored.glob("*.json"):
            shutil.copyfile(path, draft / path.name)
        save_file(
            unpack((stored / WEIGHTS).read_bytes()), draft / "model.safetensors", {"format": "pt"}
        )
        draft.chmod(0o755)
        os.rename(draft, unfolded)
    except OSError:
        # Another process won the race: its folder holds the same bytes.
        if not unfolded.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return unfolded


def _verify(stored: Path) -> str:
    """One sum over all stored files, after each has been compared with SHA256SUMS."""
    listed = (stored / SUMS).read_text()
    for line in listed.splitlines():
        expected, name = line.split(maxsplit=1)
        path = stored / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "(missing)"
        if found != expected:
            raise ModelError(
                f"{path} is damaged: sha256 {found}, expected {expected}; "
                f"restore it from the repository, or make it again with examples/pretrain.py"
            )
    return hashlib.sha256(listed.encode()).hexdigest()


def write_sums(stored: Path) -> None:
    """Record the sums of every file `materialize` reads."""
    files = sorted([*stored.glob("*.json"), stored / WEIGHTS])
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (stored / SUMS).write_text("".join(lines))


def pack(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Store weights: int8 codes and one float16 scale per row for matrices, float16 for vectors.

    Tied tensors must be passed once.
    """
    packed: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if weight.dim() < 2:
            packed[name] = weight.to(torch.float16).contiguous()
            continue
        rows = weight.float().flatten(1)  # (out, in)
        scale = (rows.abs().amax(dim=1) / _CODE_MAX).clamp(min=_SMALLEST_SCALE).to(torch.float16)
        codes = (rows / scale.float()[:, None]).round().clamp(-_CODE_MAX, _CODE_MAX)
        packed[name] = codes.to(torch.int8).reshape(weight.shape).contiguous()
        packed[name + _SCALE] = scale  # (out,)
    path.write_bytes(lzma.compress(save(packed), preset=9))


def unpack(stored: bytes) -> dict[str, torch.Tensor]:
    """The float32 weights of what `pack` stored."""
    packed = load(lzma.decompress(stored))
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in packed.items():
        if name.endswith(_SCALE):
            continue
        scale = packed.get(name + _SCALE)
        weights[name] = tensor.float()
        if scale is not None:
            weights[name] *= scale.float().reshape(-1, *[1] * (tensor.dim() - 1))
    return weights
