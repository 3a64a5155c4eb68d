"""`symbiont edge ...`: what an operator does on a device.

Knows arguments and how results are printed. Does not know how anything is done; agent.py does.
"""

import argparse
import json
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from edge_sdk.arguments import Parsers, given_text, read_given, settings
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import ConfigError
from edge_sdk.wire.config_rules import template


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add `edge` and its commands to the command line."""
    edge = subparsers.add_parser("edge", help="run this machine as a device")
    commands = edge.add_subparsers(title="commands", metavar="COMMAND", required=True)

    init = _command(commands, "init", _init, "write a commented settings file")
    init.add_argument("--broker", default="", help="mqtt://host:port or mqtts://host:port")

    enrol = _command(commands, "enrol", _enrol, "join with a one-time code")
    enrol.add_argument("code", nargs="?", default="", help='the code, or "-" to read it from stdin')
    enrol.add_argument("--code-file", default="", help="file that holds the code")
    enrol.add_argument("--timeout", type=float, default=60.0, help="seconds to wait (60)")

    run = _command(commands, "run", _run, "work until interrupted")
    run.add_argument("--events", action="store_true", help="print what happens as JSON lines")
    run.add_argument("--enrol", default="", metavar="CODE_FILE", help="enrol first if need be")

    ask = _command(commands, "ask", _ask, "put one question to this device's model")
    ask.add_argument("text", help='the text, or "-" to read it from stdin')
    ask.add_argument("--classify", action="store_true", help="answer with a label of the task")
    ask.add_argument("--max-tokens", type=int, default=None, help="length of the answer")

    _command(commands, "status", _status, "show what this device holds")
    _command(commands, "explain", _explain, "show what would leave this device")

    ledger = _command(commands, "ledger", _ledger, "show what did leave this device")
    ledger.add_argument("--since", default="", help="24h, 7d, or a date such as 2026-11-20")
    ledger.add_argument("--verify", action="store_true", help="recompute the chain of hashes first")


def _command(
    commands: "Parsers[argparse.ArgumentParser]", name: str, run: object, summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog="Any setting can be overridden: --set train.threads=2",
    )
    parser.add_argument("--config", default="edge.toml", help="settings file (edge.toml)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _print(arguments: argparse.Namespace, found: dict[str, object]) -> None:
    if arguments.json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")


def _init(arguments: argparse.Namespace) -> int:
    path = Path(arguments.config)
    values = {"link.broker": arguments.broker} if arguments.broker else {}
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template(EdgeConfig, values))
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}; choose another name") from exc
    EdgeConfig.load(path)
    _print(arguments, {"written": str(path)})
    return 0


def _enrol(arguments: argparse.Namespace) -> int:
    from edge_sdk.agent import EdgeDevice

    code = _code(arguments.code, arguments.code_file)
    with EdgeDevice(settings(arguments)) as device:
        device.enrol(code, timeout_s=arguments.timeout)
        member = device.membership
        assert member is not None
        _print(arguments, {"device": member.device, "tenant": member.tenant, "enrolled": True})
    return 0


def _code(given: str, file: str) -> str:
    """The code from a file or stdin where possible: a command line is seen by other users."""
    if file:
        return read_given(file, "code").strip()
    if given == "-":
        return sys.stdin.readline().strip()
    if not given:
        raise ConfigError("give the enrolment code, or --code-file")
    return given


def _run(arguments: argparse.Namespace) -> int:
    from edge_sdk.agent import EdgeDevice

    printing = threading.Lock()

    def show(event: dict[str, object]) -> None:
        with printing:
            print(json.dumps(event), flush=True)

    config = settings(arguments)
    with EdgeDevice(config, on_event=show if arguments.events else None) as device:
        member = device.membership
        if arguments.enrol and not (member and member.complete):
            device.enrol(_code("", arguments.enrol))
        stop = threading.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
        worker = device.run_in_background()
        while worker.is_alive() and not stop.wait(0.2):
            pass
        if arguments.events:
            show({"event": "status", **device.status()})
    return 0


def _ask(arguments: argparse.Namespace) -> int:
    from edge_sdk.agent import EdgeDevice

    text = given_text(arguments.text)
    with EdgeDevice(settings(arguments)) as device:
        if arguments.classify:
            answer = device.classify(text)
        elif arguments.json:
            answer = device.generate(text, max_tokens=arguments.max_tokens)
        else:
            for piece in device.stream(text, max_tokens=arguments.max_tokens):
                print(piece, end="", flush=True)
            print()
            return 0
        print(json.dumps({"answer": answer}) if arguments.json else answer)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from edge_sdk.agent import EdgeDevice

    with EdgeDevice(settings(arguments)) as device:
        _print(arguments, device.status())
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from edge_sdk.agent import EdgeDevice
    from edge_sdk.leaving import IN_CLEAR

    with EdgeDevice(settings(arguments)) as device:
        rows = device.explain()
    if arguments.json:
        plain = [{name: getattr(row, name) for name in row.__struct_fields__} for row in rows]
        print(json.dumps({"leaving": plain, "in_clear": IN_CLEAR}))
        return 0
    print(f"{'message':14} {'field':14} {'bytes':>9}  {'state':9} {'sealed to':28} what it says")
    for row in rows:
        size = f"{row.bytes:9}" if row.state != "possible" else f"{'-':>9}"
        sealed = f"{row.to} {row.key}".strip()
        print(f"{row.message:14} {row.field:14} {size}  {row.state:9} {sealed:28} {row.meaning}")
    print("\nIn clear, for the broker and whoever reads the traffic to it:")
    for name, said in IN_CLEAR.items():
        print(f"{name:16} {said}")
    return 0


def _ledger(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from edge_sdk.agent import EdgeDevice

    since_s = since(arguments.since, time.time())
    with EdgeDevice(settings(arguments)) as device:
        verified = device.ledger.verify() if arguments.verify else None
        entries = device.ledger.entries(since_s=since_s)
        past, head = device.ledger.past(), device.ledger.head
    if arguments.json:
        lines = [asdict(entry) for entry in entries]
        print(json.dumps({"sent": lines, "past": past, "head": head, "verified": verified}))
        return 0
    if verified is not None:
        print(f"{verified} lines fit their hashes")
    for kind, sums in past.get("kinds", {}).items():
        print(f"earlier: {sums['messages']} {kind}, {sums['wire_bytes']} bytes on the wire")
    heads = ("coordinator's time", "own clock", "message")
    print(f"{heads[0]:17} {heads[1]:17} {heads[2]:14} {'bytes':>9} {'wire':>9}  state")
    for entry in entries:
        wire = f"{entry.wire_bytes:9}" if entry.whole else f">{entry.wire_bytes:8}"
        print(
            f"{_moment(entry.trusted_s)} {_moment(entry.local_s)} {entry.kind:14} "
            f"{entry.plain_bytes:9} {wire}  {entry.state} {entry.note}\n"
            f"    task {entry.task}, to {entry.to} under {entry.key}: "
            + ", ".join(f"{name} {size}" for name, size in entry.fields.items())
        )
    print(f"head {head}")
    return 0


def _moment(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M ", time.gmtime(seconds)) if seconds else f"{'-':17}"


def since(text: str, now_s: float) -> float:
    """Return the time in seconds since 1970 that `--since TEXT` means; 0 for nothing given.

    Raises:
        ConfigError: neither a span such as 24h or 7d nor a date or time in ISO 8601 (UTC).
    """
    if not text:
        return 0.0
    units = {"m": 60, "h": 3600, "d": 86_400}
    if text[:-1].isdigit() and text[-1] in units:
        return now_s - int(text[:-1]) * units[text[-1]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise ConfigError(f"--since {text!r} is no span (30m, 24h, 7d) and no date") from exc
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
