"""The trial of a release, seen from outside: a child process, and what becomes of it.

Knows how to start `edge_sdk.probe` under limits and read its verdict. Does not know what is asked
of the model there, or where releases come from.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from edge_sdk.errors import RuntimeFailure

PROBE_BASE_MB = 4096
"""MiB of address space of a trial beside the bundle: Python and ONNX Runtime map some 2 GiB."""


class Held(Struct, frozen=True, forbid_unknown_fields=True):
    """A release on this disk: the bundle's folder and, for an adapter release, its adapter file."""

    family: str
    release: str
    bundle: str
    adapter: str = ""

    @property
    def adapter_path(self) -> Path | None:
        """The adapter file to load over the bundle, if any."""
        return Path(self.adapter) if self.adapter else None

    @property
    def base_release(self) -> str:
        """The release of the bundle below an adapter; the release itself where there is none."""
        return Path(self.bundle).name


Probe = Callable[[Held], None]
"""Tries a release without trusting it to be harmless; raises RuntimeFailure if it fails."""


def child_probe(*, timeout_s: float, memory_mb: int = 0, threads: int = 1) -> Probe:
    """Return a probe that loads the release in a child process and compares what it answers.

    A hostile or broken model can then exhaust only that process, which is limited in time and in
    address space (`memory_mb`; 0 means PROBE_BASE_MB plus four times the bundle) and can write no
    file. Its answers must come close to those the bundle gave where it was exported.
    """

    def probe(held: Held) -> None:
        size_mb = sum(f.stat().st_size for f in Path(held.bundle).rglob("*")) >> 20
        limit_mb = memory_mb or PROBE_BASE_MB + 4 * size_mb
        command = [sys.executable, "-B", "-m", "edge_sdk.probe", held.bundle, held.adapter]
        command += [str(limit_mb), str(threads), f"{timeout_s:g}"]
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=timeout_s, text=True, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise RuntimeFailure(
                f"release {held.release} did not answer within {timeout_s:g} s in its trial"
            ) from exc
        except OSError as exc:
            raise RuntimeFailure(f"cannot start the trial of {held.release}: {exc}") from exc
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeFailure(
                f"release {held.release} failed its trial (exit {done.returncode}): {words}"
            )

    return probe
