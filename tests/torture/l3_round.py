"""L3: 1,000 connected devices, each with one 256 KiB update in a round.

Knows the goal: all aggregated within 120 s, 99 % of the chunks acknowledged within a second.
`swarm.py` does it.
"""

from pathlib import Path

from tests.torture.result import Result, Scale
from tests.torture.swarm import swarm


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Measure one round; the short form has 40 devices and no clock."""
    full = scale is Scale.FULL
    devices = 1000 if full else 40
    round_ = swarm(folder, devices=devices, processes=2 if full else 1, seed=seed)
    verdict = round_.verdict
    complete = verdict.ok and round_.replies == devices == verdict.aggregated
    return Result(
        code="L3",
        title="1,000 devices in one round",
        value=round(round_.seconds, 1),
        unit=f"s until {devices} updates are in one aggregate",
        goal="all within 120 s, p99 chunk ack < 1 s",
        passed=complete and (not full or (round_.seconds <= 120 and round_.ack_p99_s < 1)),
        lost=len(verdict.lost),
        doubled=len(verdict.doubled),
        command="",
        notes={
            "chunk_ack_p50_s": round(round_.ack_p50_s, 3),
            "chunk_ack_p99_s": round(round_.ack_p99_s, 3),
            "sent_per_byte": round(round_.sent_per_byte, 3),
            "coordinator_peak_mb": round(round_.coordinator_mb),
            "broker_peak_mb": round(round_.broker_mb),
            "history": str(verdict),
        },
    )
