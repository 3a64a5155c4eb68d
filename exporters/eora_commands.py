"""The command `symbiont eora`: a bundle, its model and text in, an adapter release out.

Knows arguments and what to print. Does not know how a branch is calibrated (exporters.eora).
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from edge_sdk.errors import ExportError

Parsers = argparse._SubParsersAction  # argparse offers no public name for it


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add `eora` to the command line."""
    parser = subparsers.add_parser(
        "eora",
        help="give a quantized bundle back some of its quality, without training",
        description="Calibrate a low-rank branch that makes up for what int4 took from a bundle, "
        "and write it as an adapter release; without the adapter the bundle is as it was.",
    )
    parser.add_argument("bundle", type=Path, help="bundle folder that `symbiont export` wrote")
    parser.add_argument("model", type=Path, help="model folder that the bundle was made from")
    parser.add_argument("out", type=Path, help="folder of the adapter release to create")
    parser.add_argument("--release", required=True, help="name of the adapter release, used once")
    parser.add_argument(
        "--text", type=Path, required=True, help="UTF-8 file of text like that of its use"
    )
    parser.add_argument("--rank", type=int, default=8, help="rank of the branch (8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_eora)


def _eora(arguments: argparse.Namespace) -> int:
    from exporters.eora import export_eora

    try:
        texts = arguments.text.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ExportError(f"the text {arguments.text} cannot be read as UTF-8: {exc}") from exc
    manifest, figures = export_eora(
        arguments.bundle,
        arguments.model,
        arguments.out,
        release=arguments.release,
        texts=texts,
        rank=arguments.rank,
    )
    found = {
        "adapter": str(arguments.out),
        "family": manifest.family,
        "release": manifest.release,
        "base_release": manifest.base_release,
        "rank": arguments.rank,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        **{name: round(value, 6) for name, value in asdict(figures).items()},
    }
    if arguments.json:
        print(json.dumps(found))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:{width}}  {value}")
    return 0
