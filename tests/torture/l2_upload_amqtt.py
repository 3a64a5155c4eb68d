"""L2: the load of L1 through the embedded broker, amqtt, which speaks only MQTT 3.1.1.

Knows the goal: 20 MB/s, nothing lost. `upload.py` does it.
"""

from pathlib import Path

from tests.torture.result import Result, Scale
from tests.torture.upload import upload

GOAL_MB_S = 20.0


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Measure it; the short form proves that nothing is lost, at any speed."""
    full = scale is Scale.FULL
    measured = upload(
        folder,
        "amqtt",
        seconds=60.0 if full else 3.0,
        publishers=8 if full else 2,
        seed=seed,
        code="L2",
    )
    return measured.result(
        "L2",
        "sustained upload through amqtt",
        ">= 20 MB/s, 0 lost",
        reached=measured.rate >= GOAL_MB_S or not full,
    )
