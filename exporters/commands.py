"""The command `symbiont export`: a model folder or hub id in, a checked bundle folder out.

Knows arguments and what to print. Does not know how a model is exported (exporters.slm).
"""

import argparse
import json
import re
import time
from pathlib import Path

from edge_sdk.errors import ExportError
from exporters import eora_commands
from exporters.classifier import is_encoder

Parsers = argparse._SubParsersAction  # argparse offers no public name for it

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add `export` and `eora` to the command line."""
    eora_commands.register(subparsers)
    parser = subparsers.add_parser(
        "export",
        help="turn a trained model into a bundle for devices",
        description="Export a Hugging Face model, compare it with torch, and write a bundle folder "
        "that can be published: a decoder to int4 ONNX with LoRA inputs, an encoder "
        "(ForSequenceClassification, ForMaskedLM) to int8 ONNX; options for weights are for "
        "decoders.",
    )
    parser.add_argument("model", help="folder of save_pretrained, or a hub id such as org/name")
    parser.add_argument("out", type=Path, help="bundle folder to create")
    parser.add_argument("--family", required=True, help="name shared by all releases of this model")
    parser.add_argument("--release", required=True, help="name of this release, used once")
    parser.add_argument("--threads", type=int, default=2, help="threads on the device (2)")
    parser.add_argument(
        "--block",
        type=int,
        choices=(16, 32, 64, 128),
        help="weights per scale (64; 32 for models less than 256 wide)",
    )
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="round each weight to the nearest value: quicker to export, loses more",
    )
    parser.add_argument(
        "--embedding-bits", type=int, default=8, choices=(4, 8), help="tied table and head (8)"
    )
    parser.add_argument(
        "--exact", action="store_true", help="32-bit activations: slower, equal to torch"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 file of real text for the parity check")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_export)


def find_model(model: str) -> Path:
    """The local folder of `model`, fetched from the hub if it is an id and no folder here.

    Raises:
        ExportError: neither a folder nor an id the hub will give.
    """
    if Path(model).exists() or not _HUB_ID.match(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as exc:  # the hub's client raises some twenty kinds, none of them ours
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ExportError(
            f"{model} is not a folder here, and the hub does not give it: {reason}"
        ) from exc


def _export(arguments: argparse.Namespace) -> int:
    texts = _read_text(arguments.text) if arguments.text else []
    from exporters.slm import SlmOptions, export_slm

    if not 1 <= arguments.threads <= 1024:
        raise ExportError(f"--threads {arguments.threads} is outside 1..1024")
    options = SlmOptions(
        block=arguments.block,
        compensate=not arguments.nearest,
        embedding_bits=arguments.embedding_bits,
        accuracy_level=1 if arguments.exact else 4,
        threads=arguments.threads,
    )
    begun = time.monotonic()
    folder = find_model(arguments.model)
    names = {"family": arguments.family, "release": arguments.release}
    if is_encoder(folder):
        from exporters.encoder import export_encoder

        manifest = export_encoder(folder, arguments.out, text_for_parity=texts, **names)
    else:
        manifest = export_slm(
            folder, arguments.out, text_for_parity=texts, options=options, **names
        )
    found = {
        "bundle": str(arguments.out),
        "family": manifest.family,
        "release": manifest.release,
        "kind": manifest.kind,
        "architecture": manifest.architecture,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "adapter_slots": len(manifest.adapter_slots),
        **manifest.parity,
        "seconds": round(time.monotonic() - begun, 2),
    }
    if arguments.json:
        print(json.dumps(found))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:{width}}  {value}")
    return 0


def _read_text(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ExportError(f"the parity text {path} cannot be read as UTF-8: {exc}") from exc
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ExportError(f"the parity text {path} is empty; give a few lines of real text")
    return texts
