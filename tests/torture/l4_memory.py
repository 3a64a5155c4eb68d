"""L4: memory ceilings of coordinator and broker in a round of 1,000, and of a device's transport.

Knows how much is allowed. The round is L3's (`swarm.py`); the device is `download.py`, fed by a
courier in this process from a file of 200 MB that nobody ever reads as a whole.
"""

import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from edge_sdk.link.broker import start_broker
from edge_sdk.link.courier import Courier
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import File
from edge_sdk.wire.seal import Identity
from tests.torture.result import Result, Scale, say
from tests.torture.swarm import ROOT, swarm
from tests.torture.upload import TENANT

COORDINATOR_MB, BROKER_MB, DEVICE_MB = 500, 300, 64
_LIMIT_S = 300.0


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Measure all three; the short form has 20 devices and a file of 24 MB."""
    full = scale is Scale.FULL
    (folder / "swarm").mkdir()
    round_ = swarm(
        folder / "swarm", devices=1000 if full else 20, processes=2 if full else 1, seed=seed,
        code="L4",
    )  # fmt: skip
    say("L4", f"coordinator {round_.coordinator_mb:.0f} MB, broker {round_.broker_mb:.0f} MB")
    (folder / "download").mkdir()
    size = 200_000_000 if full else 24_000_000
    device = _download(folder / "download", size, seed)
    added = device["peak_mb"] - device["baseline_mb"]
    small = (
        round_.coordinator_mb < COORDINATOR_MB
        and round_.broker_mb < BROKER_MB
        and added < DEVICE_MB
    )
    return Result(
        code="L4",
        title="memory ceilings",
        value={
            "coordinator": round(round_.coordinator_mb),
            "broker": round(round_.broker_mb),
            "device": round(added),
        },
        unit="MB at the most",
        goal="coordinator < 500 MB, broker < 300, device < 64",
        passed=small and round_.verdict.ok and device["same"],
        lost=len(round_.verdict.lost),
        doubled=len(round_.verdict.doubled),
        command="",
        notes={
            "device_imports_mb": round(device["baseline_mb"]),
            "download_bytes": size,
            "download_mb_s": round(size / device["seconds"] / 1e6, 1),
            "file_is_the_same": device["same"],
            "history": str(round_.verdict),
        },
    )


def _download(folder: Path, size: int, seed: int) -> dict[str, float]:
    source = folder / "model.bin"
    rng = random.Random(seed)
    with source.open("wb") as file:
        for at in range(0, size, 1_000_000):
            file.write(rng.randbytes(min(1_000_000, size - at)))
    keys = {name: Identity.generate() for name in ("coordinator", "device")}
    (folder / "device.key").write_bytes(keys["device"].to_bytes())
    (folder / "coordinator.pub").write_bytes(keys["coordinator"].public.to_bytes())
    mailbox = Mailbox(folder / "coordinator.db")
    users = {"coordinator": "c", "device": "d"}
    with start_broker(folder / "broker", users=users, prefer="mosquitto") as broker:
        courier = Courier(
            MqttLink(broker.url_for("coordinator"), first_retry_s=0.1, last_retry_s=1.0),
            mailbox,
            keys["coordinator"],
            tenant=TENANT,
            me="coordinator",
            lookup={"device": keys["device"].public}.get,
            now=time.time,
            rng=random.Random(seed),
        )
        with courier:
            courier.send_file("device", File("offer", "slm/r1/model", b""), source, task="offer")
            command = [sys.executable, "-m", "tests.torture.download", str(folder)]
            child = subprocess.Popen([*command, broker.url_for("device"), str(size)], cwd=ROOT)
            try:
                child.wait(_LIMIT_S)
            finally:
                child.kill()
                child.wait()
    mailbox.close()
    told: dict[str, float] = json.loads((folder / "device.json").read_text())
    [received] = [path for path in (folder / "models" / "incoming").iterdir() if not path.suffix]
    told["same"] = _digest(received) == _digest(source)
    return told


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
