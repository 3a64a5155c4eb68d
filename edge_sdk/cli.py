"""The command `symbiont`: finds each room's commands, runs one, and turns errors into exit codes.

Knows argparse and the entry points "symbiont.commands". Does not know any command but `doctor`.

Exit codes: 0 done; 1 refused or failed, with one sentence on stderr; 2 misuse. With `--json` a
command prints one object, and a failure is the object {"error": kind, "message": sentence}.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from edge_sdk import doctor
from edge_sdk.errors import ConfigError, FleetError

GROUP = "symbiont.commands"
DONE, FAILED, MISUSE, INTERRUPTED = 0, 1, 2, 130

ADVICE = {
    "edge": "needs an extra: pip install 'symbiont[infer]'",
    "coordinator": "needs an extra: pip install 'symbiont[coordinator]'",
    "export": "needs an extra: pip install 'symbiont[export]'",
    "demo": "runs in a clone of the repository: make demo",
}
"""What to do when a group of commands cannot be loaded, by its entry point's name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code.

    A command is a function `run(arguments) -> int | None` set as the parser's default `run`.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments) or DONE)
    except ConfigError as exc:
        return _failed(arguments, exc, MISUSE)
    except FleetError as exc:
        return _failed(arguments, exc, FAILED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return DONE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with every group that is installed."""
    parser = argparse.ArgumentParser(
        prog="symbiont",
        description="Small models on devices and a large one in the cloud teach each other; "
        "the data stay where they are.",
        epilog="Exit codes: 0 done, 1 refused or failed, 2 misuse.",
    )
    parser.add_argument("--version", action="version", version=f"symbiont {_version()}")
    parser.set_defaults(run=lambda _: _show_help(parser), json=False)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    doctor.register(subparsers)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        _register(point, subparsers)
    return parser


def _register(
    point: EntryPoint, subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]"
) -> None:
    try:
        point.load().register(subparsers)
    except ImportError as exc:
        advice = ADVICE.get(point.name, "is not installed completely")
        absent = subparsers.add_parser(point.name, help=advice, add_help=False)
        absent.add_argument("anything", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
        reason = f"`symbiont {point.name}` {advice} ({exc})"
        absent.set_defaults(run=lambda _, reason=reason: _refuse(reason))


def _refuse(reason: str) -> int:
    raise FleetError(reason)


def _show_help(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return MISUSE


def _failed(arguments: argparse.Namespace, exc: FleetError, code: int) -> int:
    if getattr(arguments, "json", False):
        print(json.dumps({"error": type(exc).__name__, "message": str(exc)}))
    print(f"symbiont: {exc}", file=sys.stderr)
    return code


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("symbiont")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
