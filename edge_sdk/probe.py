"""The trial of a new model in its own process.

`python -m edge_sdk.probe BUNDLE ADAPTER MB THREADS`

Knows how to limit itself and to ask a model one thing. Does not know whether the release is
trusted; that was settled before. Exit code 0 if the model answered, 1 with one sentence if not.
"""

import math
import resource
import sys

from edge_sdk.errors import FleetError, RuntimeFailure

PROMPT = "Request: what is the time?"


def main(arguments: list[str]) -> int:
    """Load the bundle under a limit of `MB` MiB of address space and have it answer."""
    bundle, adapter, limit_mb, threads = arguments
    limit = int(limit_mb) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from edge_sdk.runtime import SlmSession

    try:
        with SlmSession(bundle, threads=int(threads)) as session:
            session.set_adapter(adapter or None)
            _, logits = session.top_logits(PROMPT, k=8)
            if not all(math.isfinite(value) for value in logits):
                raise RuntimeFailure("its logits are not finite numbers")
            session.generate(PROMPT, max_tokens=4)
            if session.task is not None:
                session.classify(PROMPT)
    except (FleetError, MemoryError) as exc:
        print(exc or "out of memory", file=sys.stderr)  # noqa: T201 - the parent reads it
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
