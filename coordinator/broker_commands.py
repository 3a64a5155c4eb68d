"""`symbiont broker config`: a strict configuration for an operator's mosquitto.

Knows argparse and what is printed; the files are written by edge_sdk/link/broker_files.py, as for
the brokers of demos and tests.
"""

import argparse
import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.config import CoordinatorConfig
from coordinator.desk import Desk
from edge_sdk.errors import ConfigError
from edge_sdk.link.broker_files import AUTHORITY_FILE, CRL_FILE, Listener, write_broker
from edge_sdk.link.passwords import COORDINATOR, coordinator_of
from edge_sdk.store.keys import write_private

if TYPE_CHECKING:
    from argparse import _SubParsersAction as Parsers

COORDINATOR_DAYS = 397
"""How long the coordinator's own certificate lasts; make the folder anew before."""


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add `broker` to the command line."""
    broker = subparsers.add_parser("broker", help="configure a strict mosquitto")
    verbs = broker.add_subparsers(title="verbs", metavar="VERB", required=True)
    summary = "write a strict mosquitto configuration into a new folder"
    config = verbs.add_parser("config", help=summary, description=summary)
    config.add_argument("--out", type=Path, required=True, help="the folder")
    config.add_argument("--port", type=int, default=0, help="1883, with TLS 8883")
    config.add_argument("--bind", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    config.add_argument("--host", default="", help="name of the broker in its certificate")
    config.add_argument("--cert", default="", help="PEM certificate of the broker")
    config.add_argument("--key", default="", help="its private key")
    config.add_argument(
        "--mtls",
        action="store_true",
        help="clients show certificates that this tenant's coordinator issues at enrolment",
    )
    config.add_argument(
        "--enrol-port", type=int, default=8884, help="with --mtls: TLS and passwords, to enrol"
    )
    config.add_argument(
        "--tenant",
        action="append",
        default=[],
        help="carry this tenant's topics alone; may be repeated, with coordinators named "
        "coordinator.TENANT (default: any tenant)",
    )
    config.add_argument("--config", type=Path, default=Path("coordinator.toml"))
    config.add_argument("--json", action="store_true", help="print one JSON object")
    config.set_defaults(run=_config)


def _config(arguments: argparse.Namespace) -> int:
    folder = arguments.out.absolute()
    if (folder / "passwords").exists():
        raise ConfigError(f"{folder} holds a broker already; choose another folder")
    tls = bool(arguments.cert or arguments.host or arguments.mtls)
    port = arguments.port or (8883 if tls else 1883)
    advice: dict[str, str] = {"service.broker_dir": str(folder)}
    if not tls:
        listeners = [Listener(port, arguments.bind)]
    else:
        listeners = _secure(arguments, folder, port, advice)
    advice["service.broker"] = listeners[0].url
    several = len(arguments.tenant) > 1
    names = [coordinator_of(t) for t in arguments.tenant] if several else [COORDINATOR]
    users = {name: secrets.token_urlsafe(24) for name in names}
    path = write_broker(folder, listeners, users=users, keep=True, tenants=arguments.tenant)
    for name, password in users.items():
        write_private(folder / f"{name}.password", password.encode() + b"\n")
    if not arguments.mtls:
        advice["service.password_file"] = str(folder / f"{names[0]}.password")
    if several:
        advice["service.username"] = names[0]
    shown = {"config": str(path), "urls": [each.url for each in listeners], "settings": advice}
    lines = [f"wrote {path}", f"start it:  mosquitto -c {path}", "in coordinator.toml:"]
    lines += [f'  {key.removeprefix("service.")} = "{value}"' for key, value in advice.items()]
    if arguments.mtls:
        lines.append(f"devices enrol at {listeners[1].url} with the password of `device token`")
    print(json.dumps(shown) if arguments.json else "\n".join(lines))
    return 0


def _secure(
    arguments: argparse.Namespace, folder: Path, port: int, advice: dict[str, str]
) -> list[Listener]:
    """The listeners with TLS, and the files they need."""
    cert, key = arguments.cert, arguments.key
    if cert and not arguments.mtls:
        listener = Listener(
            port,
            arguments.bind,
            arguments.host,
            str(Path(cert).absolute()),
            str(Path(key).absolute()) if key else "",
        )
        listener.check()
        return [listener]
    if not arguments.host and not cert:
        raise ConfigError("--mtls needs the broker's --host, or its --cert and --key")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Desk(CoordinatorConfig.load(arguments.config)) as desk:
        authority = desk.authority
        write_private(folder / AUTHORITY_FILE, authority.pem)
        if not cert:
            cert, key = str(folder / "broker.pem"), str(folder / "broker.key")
            pem, secret = authority.server(arguments.host)
            write_private(Path(cert), pem)
            write_private(Path(key), secret)
            advice["service.ca_file"] = str(folder / AUTHORITY_FILE)
        plain = Listener(port, arguments.bind, arguments.host, str(cert), str(key))
        if not arguments.mtls:
            return [plain]
        write_private(folder / CRL_FILE, authority.revocations())
        pem, secret = authority.client(COORDINATOR, days=COORDINATOR_DAYS)
        write_private(folder / "coordinator.pem", pem)
        write_private(folder / "coordinator.key", secret)
    advice["service.cert_file"] = str(folder / "coordinator.pem")
    advice["service.key_file"] = str(folder / "coordinator.key")
    mutual = Listener(
        port,
        arguments.bind,
        arguments.host,
        str(cert),
        str(key),
        str(folder / AUTHORITY_FILE),
        str(folder / CRL_FILE),
    )
    enrol = Listener(arguments.enrol_port, arguments.bind, arguments.host, str(cert), str(key))
    return [mutual, enrol]
