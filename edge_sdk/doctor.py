"""`symbiont doctor`: can this machine do what Symbiont needs, and if not, what to do about it.

Knows how to look at Python, wheels, processor, clock, disk and a broker. Changes nothing.
"""

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote

from msgspec import Struct

from edge_sdk.errors import FleetError

WHEELS = {
    "core": ("numpy", "msgspec", "paho-mqtt", "cryptography", "tuf", "safetensors"),
    "infer": ("onnxruntime", "onnxruntime-genai", "tokenizers", "constriction"),
    "train": ("torch", "transformers", "peft"),
    "export": ("onnx", "onnx-ir", "onnxscript", "optimum"),
    "coordinator": ("rich",),
    "broker": ("amqtt",),
}
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
"""Processor features that int4 kernels use; asimd is what Linux calls NEON on ARM64."""
FREE_MB = 500
"""A bundle, its draft and its predecessor, with room for the mailbox."""
BUILT_S = 1_790_000_000
"""September 2026: a clock before this release's making is wrong."""
PAYLOAD_BYTES = 128 * 1024
"""A chunk of 64 KiB and its frame, with the manifest of a 100 MB file, fit in this."""
OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(Struct, frozen=True):
    """One check: its name, "ok", "warn" or "fail", what was found, and what to do about it."""

    check: str
    verdict: str
    found: str
    advice: str = ""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor` to the command line."""
    parser = subparsers.add_parser("doctor", help="check what this machine can do")
    parser.add_argument("--broker", default="", help="also connect to mqtt[s]://[user@]host:port")
    parser.add_argument("--password-file", default="", help="file with the broker's password")
    parser.add_argument("--ca-file", default="", help="PEM file of the broker's authority")
    parser.add_argument("--state-dir", default=".", help="folder whose disk is checked")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def examine(
    *, broker: str = "", password: str = "", ca_file: str = "", state_dir: str = "."
) -> list[Finding]:
    """Return what was found; a "fail" means that Symbiont will not work here as it is."""
    found = [_python(), *_wheels(), _processor(), _clock(time.time()), _disk(Path(state_dir))]
    return found + (list(_broker(broker, password, ca_file)) if broker else [])


def _run(arguments: argparse.Namespace) -> int:
    from edge_sdk.store.settings import read_secret

    found = examine(
        broker=arguments.broker,
        password=read_secret(arguments.password_file),
        ca_file=arguments.ca_file,
        state_dir=arguments.state_dir,
    )
    healthy = all(item.verdict != FAIL for item in found)
    if arguments.json:
        checks = [{name: getattr(x, name) for name in x.__struct_fields__} for x in found]
        sys.stdout.write(json.dumps({"healthy": healthy, "checks": checks}) + "\n")
        return 0 if healthy else 1
    width = max(len(item.check) for item in found)
    for item in found:
        advice = f"  -> {item.advice}" if item.advice else ""
        sys.stdout.write(f"{item.verdict:4}  {item.check:{width}}  {item.found}{advice}\n")
    return 0 if healthy else 1


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding("python", OK, found)
    return Finding("python", FAIL, found, "use Python 3.11, 3.12 or 3.13")


def _wheels() -> Iterator[Finding]:
    for extra, names in WHEELS.items():
        held = {name: _version(name) for name in names}
        missing = [name for name, number in held.items() if not number]
        listed = ", ".join(f"{name} {number}" for name, number in held.items() if number)
        if not missing:
            yield Finding(f"wheels {extra}", OK, listed)
            continue
        wanted = "symbiont" if extra == "core" else f"symbiont[{extra}]"
        verdict = FAIL if extra == "core" else WARN
        advice = f"pip install '{wanted}'"
        yield Finding(f"wheels {extra}", verdict, f"without {', '.join(missing)}", advice)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> Finding:
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return Finding("processor", WARN, "its features cannot be read here")
    found = [name for name in FEATURES if name in words]
    if "avx2" in found or "asimd" in found:
        return Finding("processor", OK, ", ".join(found))
    return Finding("processor", WARN, ", ".join(found) or "no vector unit", "expect slow inference")


def _clock(now: float) -> Finding:
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if BUILT_S <= now < BUILT_S + 20 * 365 * 86_400:
        return Finding("clock", OK, found)
    # Messages and releases go by the coordinator's signed time; TLS goes by this clock.
    return Finding("clock", WARN, found, "set the clock: TLS and enrolment codes depend on it")


def _disk(folder: Path) -> Finding:
    existing = next((f for f in (folder, *folder.resolve().parents) if f.exists()), Path("/"))
    free_mb = shutil.disk_usage(existing).free >> 20
    if free_mb >= FREE_MB:
        return Finding("disk", OK, f"{free_mb} MiB free at {existing}")
    advice = f"free at least {FREE_MB} MiB for models and mail"
    return Finding("disk", FAIL, f"{free_mb} MiB free at {existing}", advice)


def _broker(url: str, password: str, ca_file: str) -> Iterator[Finding]:
    from edge_sdk.link.mqtt import MqttLink

    secure = url.startswith("mqtts://")
    scheme, _, place = url.partition("://")
    if password and "@" in place:
        user, _, host = place.rpartition("@")
        url = f"{scheme}://{user}:{quote(password, safe='')}@{host}"
    try:
        link = MqttLink(url, client_id="symbiont-doctor", ca=ca_file or None)
    except FleetError as exc:
        yield Finding("broker", FAIL, str(exc), "write mqtt[s]://[user@]host:port")
        return
    try:
        link.connect(wait_s=10.0)
    except FleetError as exc:
        yield Finding("broker", FAIL, str(exc), "check address, user and password file")
        return
    finally:
        limits, largest = link.limits, link.max_payload
        link.close()
    if limits is not None:
        packet = limits.max_packet_bytes or "not named"
        found = f"MQTT {limits.mqtt_version}, largest packet {packet}, payload {largest}"
        found += f", receive maximum {limits.receive_maximum}"
        enough = largest >= PAYLOAD_BYTES and limits.retain_available
        advice = "" if enough else "allow retained messages and packets of 131072 bytes"
        yield Finding("broker", OK if enough else FAIL, found, advice)
    if secure:
        yield Finding("tls", OK, "the broker's certificate was verified")
    else:
        advice = "use mqtts:// beyond this machine; content is sealed either way"
        yield Finding("tls", WARN, "not used; topics and sizes are visible", advice)
