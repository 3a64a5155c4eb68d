"""The coordinator's commands: `coordinator init|serve|status|lineage|keys`.

Knows argparse and what is printed. Does not know what it does: each command is a few calls.
torch is loaded by `serve` alone.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator import broker_commands, device_commands, release_commands
from coordinator.config import CoordinatorConfig
from coordinator.desk import Desk
from coordinator.warden import want_rotation
from edge_sdk.errors import ConfigError
from edge_sdk.wire.config_rules import parse_overrides, template

if TYPE_CHECKING:
    from argparse import _SubParsersAction as Parsers

CONFIG = "coordinator.toml"

_TASK = {
    "task.name": "requests",
    "task.prompt": "Request: {text}\nKind:",
    "task.generation_prompt": "Kind: {label}\nRequest:",
    "task.labels": ["question", "summary"],
    "task.words": [" question", " summary"],
}


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add `coordinator` and `device` to the command line."""
    coordinator = subparsers.add_parser("coordinator", help="run the cloud side")
    verbs = coordinator.add_subparsers(title="verbs", metavar="VERB", required=True)

    init = verbs.add_parser("init", help="make a folder with settings and keys")
    init.add_argument("folder", type=Path)
    init.add_argument("--tenant", default="home", help="first part of all topics")
    init.add_argument("--json", action="store_true")
    init.set_defaults(run=_init)

    serve = verbs.add_parser("serve", help="serve devices and run the program")
    _add_config(serve)
    serve.add_argument("--events", action="store_true", help="one JSON line per event on stdout")
    serve.add_argument("--stay", action="store_true", help="go on serving after the program")
    serve.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override one setting; may be repeated",
    )
    serve.set_defaults(run=_serve)

    for verb, run, text in (
        ("status", _status, "what the coordinator has done so far"),
        ("lineage", _lineage, "every release and what it was made from"),
    ):
        parser = verbs.add_parser(verb, help=text)
        _add_config(parser)
        parser.set_defaults(run=run)

    keys = verbs.add_parser("keys", help="the public keys in use, and when they change")
    keys.add_argument("--rotate", action="store_true", help="replace the epoch key now")
    _add_config(keys)
    keys.set_defaults(run=_keys)

    device_commands.register(subparsers)
    broker_commands.register(subparsers)
    release_commands.register(subparsers)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path(CONFIG), help=f"default: {CONFIG}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _init(arguments: argparse.Namespace) -> int:
    path = arguments.folder / CONFIG
    if path.exists():
        raise ConfigError(f"{path} exists; edit it, or choose another folder")
    values = {"service.tenant": arguments.tenant, "llm.path": "models/llm", **_TASK}
    text = template(CoordinatorConfig, values) + _FAMILIES
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc
    config = CoordinatorConfig.load(path)
    with Desk(config) as desk:
        key = desk.root.public.sign_id.hex()
    _show(
        arguments,
        {"config": str(path), "root_key": key},
        f"wrote {path} and keys (root key {key}).\n"
        f"Next: name your models and task in it, then `symbiont coordinator serve --config {path}`",
    )
    return 0


_FAMILIES = """
# One or more families of small models: a name and a Hugging Face folder.
[[families]]
name = "slm"
path = "models/slm"
# 4 multiplies in 8 bits on devices (fast), 1 in 32 bits (exact). Allowed: 1 or 4.
# accuracy_level = 4
"""


def _serve(arguments: argparse.Namespace) -> int:
    from coordinator.service import Service  # loads torch and the exporters

    overrides = parse_overrides([f"--{item}" for item in arguments.set])
    config = CoordinatorConfig.load(arguments.config, overrides)
    with Service(config, stream=sys.stdout if arguments.events else None) as service:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.stop())
        done = service.serve(stay=arguments.stay)
    if not arguments.events:
        print("done" if done else "stopped; start again to go on")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        status: dict[str, Any] = {
            "tenant": desk.config.service.tenant,
            "devices": {d.device: str(d.state) for d in desk.fleet.list()},
            "runs": desk.store.runs(),
            "releases": {
                line["family"]: line["release"]
                for line in desk.registry().lineage()
                if line["promoted"]
            },
            "waiting_letters": len(desk.mailbox.waiting()),
            "notes": [e for e in desk.store.events(last=200) if e["event"] == "note"][-5:],
            "traffic": _traffic(desk.store.events(last=2000)),
        }
    lines = [f"tenant {status['tenant']}"]
    lines += [f"device {name}: {state}" for name, state in status["devices"].items()]
    lines += [f"run {r['run']}: {r['commits']} commits, {r['state']}" for r in status["runs"]]
    lines += [f"release {family}: {name}" for family, name in status["releases"].items()]
    lines += [
        f"run {t['run']}, round {t['round']}: updates {t['bytes_up']} B up, "
        f"tasks and offers {t['bytes_down']} B down, files asked for {t['files']} B"
        for t in status["traffic"][-5:]
    ]
    _show(arguments, status, "\n".join(lines))
    return 0


def _traffic(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes by round: updates up, training tasks, lessons and offers down, and the files that any
    device asked for since the round before; before seals and transport."""
    names = ("run", "round", "bytes_up", "bytes_down")
    rounds, files = [], 0
    for event in events:
        if event["event"] == "files":
            files += event["bytes"]
        if event["event"] == "note" and all(name in event for name in names):
            rounds.append({name: event[name] for name in names} | {"files": files})
            files = 0
    return rounds


def _lineage(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        releases = desk.registry().lineage()
    lines = [
        f"{r['family']}/{r['release']}"
        + (f" on {r['base']}" if r["base"] else "")
        + (" (promoted)" if r["promoted"] else "")
        for r in releases
    ]
    _show(arguments, {"releases": releases}, "\n".join(lines) or "no releases yet")
    return 0


def _keys(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        if arguments.rotate:
            want_rotation(desk)
        public = desk.identity.public
        made_s, retired = desk.ring.made_s, desk.ring.retired
        shown = {
            "root": desk.root.public.sign_id.hex(),
            "sign": public.sign_id.hex(),
            "receive": public.receive_id.hex(),
            "made_s": made_s,
            "retired": retired,
            "rotation_wanted": bool(arguments.rotate),
        }
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(made_s))
    text = f"root {shown['root']}\nsigning {shown['sign']}\nepoch {shown['receive']}, made {made}"
    if retired:
        text += f"\n{retired} older epoch keys still open what was sealed for them"
    if arguments.rotate:
        text += "\na running service replaces the epoch key within a second"
    _show(arguments, shown, text)
    return 0


def _desk(arguments: argparse.Namespace) -> Desk:
    return Desk(CoordinatorConfig.load(arguments.config))


def _show(arguments: argparse.Namespace, shown: object, text: str) -> None:
    print(json.dumps(shown) if arguments.json else text)
