"""The commands `symbiont release list|show|stage|promote|pause|roll-back|withdraw|rotate-key`.

Knows argparse and what is printed. Does not know how a decision is carried out: it writes into the
book of roll-outs, and a service that runs with `--stay` reads it there within a second.
"""

import argparse
import getpass
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from coordinator.config import CoordinatorConfig
from coordinator.desk import Desk
from coordinator.programs import Publish
from coordinator.registry import Registry
from coordinator.rollout import Book, Plan, Rollout, State, summary
from coordinator.staging import figures
from edge_sdk.errors import ConfigError
from exporters.bundle import read_manifest
from exporters.publisher import ROLES, KeyPlan, Publisher

if TYPE_CHECKING:
    from argparse import _SubParsersAction as Parsers

CONFIG = "coordinator.toml"
NEXT = {
    State.STAGED: "a service with --stay begins the trial once no program runs",
    State.MEASURING: "the trial devices are measured with the release they run",
    State.CANARY: "on trial; promote it, pause it or roll it back",
    State.PAUSED: "offered to no further device; stage, promote or roll back",
    State.PROMOTED: "offered to every device",
    State.ROLLED_BACK: "devices return to the release before",
    State.WITHDRAWN: "",
}


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add `release` to the command line."""
    release = subparsers.add_parser("release", help="try, promote, roll back and withdraw releases")
    verbs = release.add_subparsers(title="verbs", metavar="VERB", required=True)

    listing = verbs.add_parser("list", help="all releases and where they stand")
    _common(listing, _list)
    show = verbs.add_parser("show", help="one release: its trial, figures and who decided what")
    show.add_argument("family")
    show.add_argument("release")
    _common(show, _show)

    stage = verbs.add_parser("stage", help="offer a release to a few devices first")
    stage.add_argument("family")
    stage.add_argument("release")
    stage.add_argument("--bundle", type=Path, help="exported folder to sign first")
    stage.add_argument("--share", type=float, help="share of the devices, above 0 up to 1")
    stage.add_argument("--size", type=int, help="number of devices, instead of a share")
    stage.add_argument("--devices", help="just these devices, separated by commas")
    stage.add_argument("--max-drop", type=float, help="most that accuracy may fall, 0 to 1")
    stage.add_argument("--within-s", type=float, help="seconds to wait for them, then pause")
    stage.add_argument(
        "--promote", action="store_true", default=None, help="promote by itself if all went well"
    )
    _decision(stage, _stage)

    for verb, run, text in (
        ("promote", _promote, "offer the release on trial to every device"),
        ("pause", _pause, "offer the release on trial to no further device"),
    ):
        parser = verbs.add_parser(verb, help=text)
        parser.add_argument("family")
        _decision(parser, run)
    back = verbs.add_parser("roll-back", help="return every device to the release before")
    back.add_argument("family")
    back.add_argument("--to", metavar="RELEASE", help="to this one, instead of the one before")
    _decision(back, _roll_back)
    withdraw = verbs.add_parser("withdraw", help="take a release back for good")
    withdraw.add_argument("family")
    withdraw.add_argument("release")
    _decision(withdraw, _withdraw)

    rotate = verbs.add_parser("rotate-key", help="give a signing role new keys")
    rotate.add_argument("role", choices=ROLES)
    rotate.add_argument("--count", type=int, default=1, help="how many keys it gets (1)")
    rotate.add_argument("--threshold", type=int, default=1, help="how many must sign (1)")
    rotate.add_argument(
        "--out", type=Path, action="append", default=[], help="folder for new keys; repeatable"
    )
    _keys(rotate)
    _common(rotate, _rotate)


def _common(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--config", type=Path, default=Path(CONFIG), help=f"default: {CONFIG}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keys", type=Path, action="append", default=[], help="folder of offline keys; repeatable"
    )


def _decision(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--why", default="", help="the reason, kept in the audit")
    parser.add_argument("--who", default="", help="who decides (default: this user)")
    _keys(parser)
    _common(parser, run)


# --- the verbs ------------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        registry, book = _rooms(desk, arguments)
        latest: dict[tuple[str, str], Rollout] = {}
        for rollout in book.history():
            latest[rollout.family, rollout.release] = rollout
        releases = []
        for line in registry.lineage():
            known = latest.get((line["family"], line["release"]))
            state = str(known.state) if known else "published"
            if line["withdrawn"]:
                state = "withdrawn"
            elif line["promoted"]:
                state = "promoted"
            elif state == State.PROMOTED:
                state = "superseded"
            releases.append({**line, "state": state})
    lines = [
        f"{r['family']}/{r['release']:<24} {r['state']:<12} {_when(r['at'])}"
        + (f" on {r['base']}" if r["base"] else "")
        for r in releases
    ]
    _print(arguments, {"releases": releases}, "\n".join(lines) or "no releases yet")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        registry, book = _rooms(desk, arguments)
        lines = {line["release"]: line for line in registry.lineage(arguments.family)}
        if arguments.release not in lines:
            registry.require(arguments.family, arguments.release)
        trials = [r for r in book.history(arguments.family) if r.release == arguments.release]
        offers = book.offered(trials[-1].number) if trials else []
        shown: dict[str, Any] = {
            **lines[arguments.release],
            "rollouts": [summary(rollout) for rollout in trials],
            "figures": figures(trials[-1], offers) if trials else None,
            "devices": [
                {
                    "device": offer.device,
                    "purpose": offer.purpose,
                    "release": offer.release,
                    "state": offer.state,
                    "accuracy": offer.accuracy,
                    "tokens_per_s": offer.tokens_per_s,
                    "reason": offer.reason,
                }
                for offer in offers
            ],
            "audit": book.audit(arguments.family, arguments.release),
        }
    text = [f"{arguments.family}/{arguments.release}"]
    if trials:
        text += [f"state     {trials[-1].state}: {NEXT[trials[-1].state]}"]
        text += [f"{name:<16} {value}" for name, value in shown["figures"].items()]
    text += [
        f"{d['device']:<24} {d['purpose']:<8} {d['release']:<16} {d['state']:<7} "
        + (f"accuracy {d['accuracy']:.3f}" if d["accuracy"] is not None else d["reason"])
        for d in shown["devices"]
    ]
    text += [
        f"{_when(a['at'])} {a['who']}: {a['action']}" + (f" ({a['why']})" if a["why"] else "")
        for a in shown["audit"]
    ]
    _print(arguments, shown, "\n".join(text))
    return 0


def _stage(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        registry, book = _rooms(desk, arguments)
        plan = _plan(desk.config.rollout, arguments)
        unknown = set(plan.devices) - set(desk.fleet.active(arguments.family))
        if unknown:
            raise ConfigError(f"{min(unknown)} is no active device of {arguments.family}")
        if arguments.bundle is not None:
            manifest = read_manifest(arguments.bundle)
            wish = Publish(
                arguments.family, arguments.release, arguments.bundle, base=manifest.base_release
            )
            registry.publish(wish, promote=False)
        rollout = book.stage(
            arguments.family, arguments.release, plan, who=_who(arguments), why=arguments.why
        )
    return _decided(arguments, rollout)


def _plan(settings: Plan, arguments: argparse.Namespace) -> Plan:
    given = {
        "share": arguments.share,
        "size": arguments.size,
        "max_drop": arguments.max_drop,
        "within_s": arguments.within_s,
        "promote": arguments.promote,
        "devices": [d for d in (arguments.devices or "").split(",") if d] or None,
    }
    values = msgspec.to_builtins(settings)
    values |= {key: value for key, value in given.items() if value is not None}
    try:
        return msgspec.convert(values, Plan)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"the trial cannot be planned so: {exc}") from exc


def _promote(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        _, book = _rooms(desk, arguments)
        rollout = book.promote(arguments.family, who=_who(arguments), why=arguments.why)
    return _decided(arguments, rollout)


def _pause(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        _, book = _rooms(desk, arguments)
        rollout = book.pause(arguments.family, who=_who(arguments), why=arguments.why)
    return _decided(arguments, rollout)


def _roll_back(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        _, book = _rooms(desk, arguments)
        rollout = book.roll_back(
            arguments.family, to=arguments.to, who=_who(arguments), why=arguments.why
        )
    return _decided(arguments, rollout)


def _withdraw(arguments: argparse.Namespace) -> int:
    with _desk(arguments) as desk:
        _, book = _rooms(desk, arguments)
        book.withdraw(arguments.family, arguments.release, who=_who(arguments), why=arguments.why)
    shown = {"family": arguments.family, "release": arguments.release, "state": "withdrawn"}
    _print(arguments, shown, f"{arguments.family}/{arguments.release} is withdrawn")
    return 0


def _rotate(arguments: argparse.Namespace) -> int:
    plan = KeyPlan(arguments.count, arguments.threshold, tuple(arguments.out))
    with _desk(arguments) as desk:
        publisher = _publisher(desk, arguments)
        publisher.rotate(arguments.role, plan)
        expires = {role: str(day.date()) for role, day in publisher.expires().items()}
    shown = {"role": arguments.role, "keys": plan.keys, "threshold": plan.threshold}
    text = f"{arguments.role} has {plan.keys} new keys, {plan.threshold} of which must sign"
    _print(arguments, {**shown, "expires": expires}, text)
    return 0


# --- small things ---------------------------------------------------------------------------------


def _decided(arguments: argparse.Namespace, rollout: Rollout) -> int:
    text = f"{rollout.family}/{rollout.release} is {rollout.state}: {NEXT[rollout.state]}"
    _print(arguments, summary(rollout), text)
    return 0


def _rooms(desk: Desk, arguments: argparse.Namespace) -> tuple[Registry, Book]:
    registry = Registry(desk.store, _publisher(desk, arguments), desk.now)
    return registry, Book(desk.store, registry, desk.now)


def _publisher(desk: Desk, arguments: argparse.Namespace) -> Publisher:
    return Publisher(desk.folder / "releases", keys=getattr(arguments, "keys", ()))


def _who(arguments: argparse.Namespace) -> str:
    if arguments.who:
        return str(arguments.who)
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return "unknown"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def _desk(arguments: argparse.Namespace) -> Desk:
    return Desk(CoordinatorConfig.load(arguments.config))


def _print(arguments: argparse.Namespace, shown: object, text: str) -> None:
    print(json.dumps(shown) if arguments.json else text)
