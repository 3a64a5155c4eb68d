"""A device in a process of its own, for tests that kill it: python courier_process.py FOLDER URL.

FOLDER holds `device.key`, `coordinator.pub` and, once this ran, the device's mailbox. With a third
argument, a message of so many bytes is put into the outbox first. Runs until it is killed or until
the outbox is empty.
"""

import random
import sys
import time
from pathlib import Path

from edge_sdk.link.courier import Courier
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import File
from edge_sdk.wire.seal import Identity, PublicIdentity


def main(folder: Path, url: str, size: int) -> None:
    coordinator = PublicIdentity.from_bytes((folder / "coordinator.pub").read_bytes())
    mailbox = Mailbox(folder / "kitchen.db")
    link = MqttLink(url, first_retry_s=0.05, last_retry_s=0.5)
    courier = Courier(
        link,
        mailbox,
        Identity.from_bytes((folder / "device.key").read_bytes()),
        tenant="home",
        me="kitchen",
        lookup={"coordinator": coordinator}.get,
        now=time.time,
        rng=random.Random(1),
        patience_s=1.0,
    )
    if size:
        data = random.Random(size).randbytes(size)
        courier.send("coordinator", File(task_id="t", path="p", data=data), task="t")
    with courier:
        while mailbox.pending():
            time.sleep(0.02)
    mailbox.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
