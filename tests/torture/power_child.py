"""A coordinator and two devices in one process, to be recorded: every write of all three.

Usage: python -m tests.torture.power_child FOLDER STEPS SEED

Knows a fixed number of steps, or how to go on where the stores are. Uses the memory broker, so that
one trace has one order for what is stored and what is told.
"""

import random
import sys
import time
from pathlib import Path

from edge_sdk.errors import LinkError
from edge_sdk.link.memory import MemoryBroker
from tests.torture.history import History
from tests.torture.parties import RUN, Device, Headquarters, counting

NAMES = ("a", "b")
SMALL_BYTES = (500, 6_000)
LARGE_BYTES = 600_000
"""Above what a store keeps in its rows: such a message has a file of its own."""
LARGE_SHARE = 0.04
WITHIN_S = 5.0
DEADLINE_S = 60.0


def world(folder: Path, steps: int, seed: int) -> int:
    """Go on to the end of step number `steps` (at least two more) and return which was the last."""
    broker = MemoryBroker()
    office = Headquarters(folder / "hq", broker.link("coordinator"), NAMES, patience_s=0.1)
    history = History(folder / "history" / "coordinator.jsonl")
    devices = [
        Device(
            name,
            folder / "hq",
            broker.link(name),
            folder / "history",
            size=_size,
            seed=seed,
            patience_s=0.1,
        )
        for name in NAMES
    ]
    resume = office.store.last_commit(RUN)
    last = max(steps, 2 if resume is None else resume.step + 3)
    office.start()
    for device in devices:
        device.start()
    deadline = time.monotonic() + DEADLINE_S

    def over(step: int) -> bool:
        if time.monotonic() > deadline:
            raise LinkError(f"step {step} was not done within {DEADLINE_S:.0f} s")
        return step >= last

    program = counting(NAMES, history, need=len(NAMES), within_s=WITHIN_S, over=over)
    try:
        office.runner.run(program, run=RUN)
        office.wait_until_delivered(DEADLINE_S)
        for device in devices:
            device.wait_until_idle(DEADLINE_S)
    finally:
        for device in devices:
            device.close()
        office.account(history)
        office.close()
        history.close()
    return last


def _size(rng: random.Random) -> int:
    return LARGE_BYTES if rng.random() < LARGE_SHARE else rng.randint(*SMALL_BYTES)


if __name__ == "__main__":
    world(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
