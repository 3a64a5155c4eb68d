"""`symbiont device token|list|approve|revoke`: who may take part.

Knows argparse and what is printed. Does not know how it is done: the desk changes the tables that a
running service looks at for every message, and the broker's files where the broker runs here.
"""

import argparse
import json
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.config import CoordinatorConfig
from coordinator.desk import Desk
from edge_sdk.errors import ConfigError
from edge_sdk.link.broker_files import reload, set_user

if TYPE_CHECKING:
    from argparse import _SubParsersAction as Parsers


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add `device` to the command line."""
    device = subparsers.add_parser("device", help="enrol, list, approve and revoke devices")
    verbs = device.add_subparsers(title="verbs", metavar="VERB", required=True)
    token = _verb(verbs, "token", _token, "print a one-time enrolment code")
    token.add_argument("--device", required=True, help="the device's id, chosen by you")
    token.add_argument("--hours", type=float, default=1.0, help="how long it is good, up to 24")
    _verb(verbs, "list", _list, "all devices")
    approve = _verb(verbs, "approve", _approve, "let a pending or quarantined device in")
    approve.add_argument("device")
    revoke = _verb(verbs, "revoke", _revoke, "refuse a device from now on")
    revoke.add_argument("device")


def _verb(
    verbs: "Parsers[argparse.ArgumentParser]", name: str, run: object, summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary)
    parser.add_argument("--config", type=Path, default=Path("coordinator.toml"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _token(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        code = desk.token(arguments.device, lasts_s=arguments.hours * 3600)
        broker = _let_in(desk, code.device)
    shown = {"device": code.device, "code": code.to_text(), "expires_s": code.expires_s, **broker}
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(code.expires_s))
    lines = [
        code.to_text(),
        f"Good once, for {code.device}, until {until}. It is not shown again. On the device:",
        "  symbiont edge enrol <code>",
    ]
    if broker:
        lines.append(f"with broker user {code.device} and password {broker['broker_password']}")
    _show(arguments, shown, "\n".join(lines))
    return 0


def _let_in(desk: Desk, device: str) -> dict[str, str]:
    """Give the device a password for the broker that runs here, if one does."""
    if not desk.config.service.broker_dir:
        return {}
    folder, password = Path(desk.config.service.broker_dir), secrets.token_urlsafe(24)
    set_user(folder, device, password)
    shown = {"broker_user": device, "broker_password": password}
    try:
        reload(folder)
    except ConfigError as exc:
        shown["broker_note"] = str(exc)
    return shown


def _list(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        desk.fleet.quarantine.expire()
        devices = [{**d.summary(), **desk.fleet.quarantine.of(d.device)} for d in desk.fleet.list()]
    lines = [
        f"{d['device']:<24} {d['state']:<12} faults {d['faults']:<3} seen "
        + time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(d["last_seen"]))
        + (f"\n    last fault: {d['last_fault']}" if d["last_fault"] else "")
        + (f"\n    {_term(d['quarantined_until'])}" if d["state"] == "quarantined" else "")
        for d in devices
    ]
    _show(arguments, {"devices": devices}, "\n".join(lines) or "no devices yet")
    return 0


def _term(until: float | None) -> str:
    if not until:
        return "in quarantine until `symbiont device approve` lifts it"
    return f"in quarantine until {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(until))}"


def _approve(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        desk.approve(arguments.device)
    shown = {"device": arguments.device, "state": "active"}
    _show(arguments, shown, f"{arguments.device} may take part")
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        ended = desk.revoke(arguments.device)
    shown = {"device": arguments.device, "state": "revoked", "session": ended}
    text = f"{arguments.device} is revoked: nothing from it is accepted any more"
    _show(arguments, shown, f"{text}; its session: {ended}")
    return 0


def _desk(arguments: argparse.Namespace) -> Desk:
    return Desk(CoordinatorConfig.load(arguments.config))


def _show(arguments: argparse.Namespace, shown: object, text: str) -> None:
    print(json.dumps(shown) if arguments.json else text)
