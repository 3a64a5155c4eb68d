"""The trial of a new model in its own process.

`python -m edge_sdk.probe BUNDLE ADAPTER MB THREADS SECONDS`

Knows how to limit itself, to ask a model one thing, and to compare its logits with those it gave
where it was exported (`golden.json`). Does not know whether the release is trusted; that was
settled before. Exit code 0 if the model answered well, 1 with one sentence if not.
"""

import math
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.errors import FleetError, RuntimeFailure
from edge_sdk.wire.manifest import GOLDEN_FILE, MAX_MANIFEST_BYTES, Golden, decode_golden

if TYPE_CHECKING:
    from edge_sdk.encoders import EncoderSession
    from edge_sdk.runtime import SlmSession

PROMPT = "Request: what is the time?"
GOLDEN_ERROR_MAX = 0.1
"""Largest |z - z'| / |z - mean z| over a golden row. Rounding differs between processors, the most
with 8-bit activations (some 0.01); a wrong or damaged graph is off by its whole size."""


def main(arguments: list[str]) -> int:
    """Load the bundle under limits of address space, processor time and written bytes, and ask."""
    bundle, adapter, limit_mb, threads, seconds = arguments
    limit_self(int(limit_mb) << 20, math.ceil(float(seconds)) * max(1, int(threads)))
    from edge_sdk.runtime import SlmSession
    from edge_sdk.sessions import open_session

    try:
        with open_session(bundle, threads=int(threads), check=False) as session:
            golden = read_golden(Path(bundle))
            ask(session, golden, adapter)
            while isinstance(session, SlmSession) and session.next_graph():
                ask(session, golden, adapter)
    except (FleetError, MemoryError) as exc:
        print(exc or "out of memory", file=sys.stderr)  # noqa: T201 - the parent reads it
        return 1
    return 0


def ask(session: "SlmSession | EncoderSession", golden: Golden | None, adapter: str) -> None:
    """Ask the graph that is open for everything that a device will ask it for.

    Raises:
        RuntimeFailure: it fails, or answers otherwise than where it was exported.
    """
    from edge_sdk.runtime import SlmSession

    session.set_adapter(None)
    if golden is not None:
        compare(session, golden)
    session.set_adapter(adapter or None)
    logits = session.next_logits(session.encode(PROMPT))
    if not all(math.isfinite(value) for value in logits):
        raise RuntimeFailure("its logits are not finite numbers")
    if isinstance(session, SlmSession):
        session.generate(PROMPT, max_tokens=4)
    if session.task is not None:
        session.classify(PROMPT)


def limit_self(memory: int, cpu_s: int) -> None:
    """Limit this process for good: bytes of address space, seconds of processor time, no files."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read_golden(bundle: Path) -> Golden | None:
    """Return the answers expected of `bundle`, None for a bundle made without.

    Raises:
        RemoteProtocolError: the file is malformed.
        RuntimeFailure: it cannot be read.
    """
    try:
        with (bundle / GOLDEN_FILE).open("rb") as file:
            return decode_golden(file.read(MAX_MANIFEST_BYTES + 1))
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise RuntimeFailure(f"{GOLDEN_FILE} cannot be read: {exc}") from exc


def compare(session: "SlmSession | EncoderSession", golden: Golden) -> float:
    """Return the largest relative error of the golden rows, at most GOLDEN_ERROR_MAX.

    Raises:
        RuntimeFailure: a row is further off, or does not fit the model.
    """
    import numpy as np

    worst = 0.0
    for row in golden.rows:
        logits = session.next_logits(row.ids)  # (vocab,)
        if max(row.columns) >= len(logits):
            raise RuntimeFailure("its expected answers name tokens that it does not have")
        expected = np.asarray(row.logits, np.float64)
        found = np.asarray(logits, np.float64)[list(row.columns)]
        size = float(np.linalg.norm(expected - expected.mean()))
        error = float(np.linalg.norm(found - expected)) / max(size, 1e-30)
        if not error <= GOLDEN_ERROR_MAX:
            raise RuntimeFailure(
                f"its logits are {error:.3f} from those of its export; allowed: {GOLDEN_ERROR_MAX}"
            )
        worst = max(worst, error)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
