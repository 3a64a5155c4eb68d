"""L1: sustained upload of encrypted 64 KiB chunks through mosquitto to one coordinator.

Knows the goal: 40 MB/s for 60 s, nothing lost, nothing doubled. `upload.py` does it.
"""

from pathlib import Path

from tests.torture.result import Result, Scale
from tests.torture.upload import upload

GOAL_MB_S = 40.0


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Measure it; the short form proves that nothing is lost, on any machine, at any speed."""
    full = scale is Scale.FULL
    measured = upload(
        folder, "mosquitto", seconds=60.0 if full else 3.0, publishers=8 if full else 2, seed=seed
    )
    return measured.result(
        "L1",
        "sustained upload through mosquitto",
        ">= 40 MB/s for 60 s, 0 lost",
        reached=measured.rate >= GOAL_MB_S or not full,
    )
