"""Which machine and which versions a figure was measured on.

Knows /proc, the interpreter and the installed packages. Does not know any path, host or user name.
"""

import os
import platform
import shutil
import sqlite3
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("cryptography", "paho-mqtt", "amqtt", "tuf", "safetensors", "msgspec", "numpy")


def machine() -> str:
    """Return processor, usable cores, memory and system in one line."""
    cpu = _first(Path("/proc/cpuinfo"), "model name").partition(":")[2].strip()
    memory = _first(Path("/proc/meminfo"), "MemTotal").split()
    gib = f"{int(memory[1]) / 2**20:.0f} GiB" if len(memory) > 1 else "memory unknown"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu or platform.machine()}, {cores} cores, {gib}, {platform.system()}"


def versions() -> dict[str, str]:
    """Return the versions that a figure may depend on; what is not installed is left out."""
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    mosquitto = _mosquitto()
    return {**found, **({"mosquitto": mosquitto} if mosquitto else {})}


def _mosquitto() -> str:
    program = shutil.which("mosquitto")
    if program is None:
        return ""
    told = subprocess.run([program, "-h"], capture_output=True, text=True, check=False).stdout
    return told.split("\n", 1)[0].removeprefix("mosquitto version ").strip()


def _first(path: Path, start: str) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(start)), "")
