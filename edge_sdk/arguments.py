"""Arguments that commands on this machine share: which settings, which model, which text.

Knows argparse, settings files and bundle folders. Does not know what is done with a model.

The model of `ask`, `chat` and `serve-local` is a bundle folder, or the one this machine's device
runs (`--config`).
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.config import EdgeConfig
from edge_sdk.errors import ConfigError, DataError, FleetError
from edge_sdk.wire.config_rules import parse_overrides
from edge_sdk.wire.manifest import MANIFEST_FILE, decode_manifest

if TYPE_CHECKING:
    from edge_sdk.agent import EdgeDevice

Parsers = argparse._SubParsersAction  # argparse offers no public name for it


def add_command(
    commands: "Parsers[argparse.ArgumentParser]", name: str, run: object, summary: str
) -> argparse.ArgumentParser:
    """Add the command `name`, carried out by `run`; return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="print JSON, one object per answer")
    parser.set_defaults(run=run)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add what names a device's settings, and the threads of a bundle opened without any."""
    parser.add_argument("--config", default="edge.toml", help="the device's settings (edge.toml)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--threads", type=whole, default=1, help="with bundles: threads (1)")


def positive(text: str) -> int:
    """Read a whole number of 1 or more; argparse reports others."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def whole(text: str) -> int:
    """Read a whole number of 0 or more; argparse reports others."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def seconds(text: str) -> float:
    """Read a number above 0; argparse reports others."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def settings(arguments: argparse.Namespace) -> EdgeConfig:
    """Return the device's settings that `--config` names, with those of `--set` in them.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    overrides = parse_overrides([f"--{item}" for item in arguments.set])
    return EdgeConfig.load(arguments.config, overrides)


def open_bundle(bundle: str, threads: int) -> Any:
    """Open the model in the folder `bundle`.

    Raises:
        DigestError: a file is not the one that was exported.
        RuntimeFailure: no bundle there, or it cannot be loaded.
    """
    from edge_sdk.sessions import open_session

    return open_session(bundle, threads=threads)


def open_device(arguments: argparse.Namespace) -> "EdgeDevice":
    """Open the device whose settings `--config` names.

    Raises:
        ConfigError: there is no such file, or it is wrong.
        StorageError: the state folder refuses.
    """
    from edge_sdk.agent import EdgeDevice

    if not Path(arguments.config).exists():
        raise ConfigError(
            f"there is no settings file {arguments.config}; name a bundle folder, or write the "
            "file with `symbiont edge init`"
        )
    return EdgeDevice(settings(arguments))


def model_name(session: Any) -> str:
    """Return the name a model is served under: its family, which stays when its release changes."""
    folder: Path = session.folder
    try:
        return decode_manifest((folder / MANIFEST_FILE).read_bytes()).family
    except (OSError, FleetError):
        return folder.resolve().name


def given_text(text: str) -> str:
    """Return `text`, or what stdin holds where it is "-".

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        text = sys.stdin.read() if text == "-" else text
        text.encode()
    except UnicodeError as exc:
        raise DataError("the text is not UTF-8; convert it") from exc
    return text


def read_given(path: str, what: str) -> str:
    """Return the text of a file named on the command line; `what` it is goes into the error.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the {what} file {path}: {exc}") from exc
