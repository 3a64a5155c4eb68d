"""F5: a broker that acknowledges messages and throws them away, at the load of L1.

Knows the setting: `max_queued_messages 5`, so mosquitto keeps five messages for a subscriber beyond
those in flight, answers success to every publisher and drops the rest. `upload.py` does the load.
"""

import subprocess
from pathlib import Path

from edge_sdk.link.broker import Broker, find_mosquitto
from edge_sdk.link.passwords import read_password_file
from tests.torture.result import Result, Scale
from tests.torture.upload import upload


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Measure it: every update must arrive, and the broker must really have dropped some."""
    full = scale is Scale.FULL
    config = folder / "broker" / "mosquitto.conf"
    log = folder / "broker" / "stingy.log"

    def stingy(broker: Broker) -> Broker:
        lines = config.read_text().splitlines()
        kept = [line for line in lines if not line.startswith("max_queued_")]
        config.write_text("\n".join([*kept, "max_queued_messages 5", "log_type notice", ""]))
        broker.close()
        command = [find_mosquitto() or "mosquitto", "-c", str(config)]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=out)
        users = {
            name: f"secret-{name}" for name in read_password_file(config.with_name("passwords"))
        }
        return Broker("mosquitto", broker.port, process, config.parent, users)

    measured = upload(
        folder,
        "mosquitto",
        seconds=60.0 if full else 4.0,
        publishers=8 if full else 3,
        seed=seed,
        code="F5",
        prepare=stingy,
    )
    drops = log.read_text("utf-8", errors="replace").count("being dropped")
    return measured.result(
        "F5",
        "a broker that drops",
        "0 lost at the rate of L1",
        reached=not full or (measured.rate >= 40.0 and measured.resent > 1.01),
        notes={"broker_said_that_it_drops": drops},
    )
