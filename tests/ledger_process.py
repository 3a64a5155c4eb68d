"""A device with a ledger in a process of its own: python ledger_process.py FOLDER URL SEED COUNT.

Puts COUNT messages of seeded sizes into the outbox once, then sends until it is killed or done.
"""

import random
import sys
import time
from pathlib import Path

from edge_sdk.link.courier import Courier
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.ledger import Ledger
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import AdapterUpdate, encode
from edge_sdk.wire.seal import Identity, PublicIdentity


def main(folder: Path, url: str, seed: int, count: int) -> None:
    coordinator = PublicIdentity.from_bytes((folder / "coordinator.pub").read_bytes())
    mailbox = Mailbox(folder / "device.db")
    ledger = Ledger(mailbox, time.time)
    rng = random.Random(seed)
    if not mailbox.pending() and not ledger.entries():
        with mailbox.transaction():
            for number in range(count):
                codes = rng.randbytes(rng.choice([100, 5_000, 90_000, 200_000]))
                update = AdapterUpdate(
                    f"train-{number}", number, "base", "codec", codes, 5, 100, 0.5, {}, 1.0
                )
                mailbox.put("coordinator", "AdapterUpdate", update.task_id, encode(update))
    courier = Courier(
        MqttLink(url, first_retry_s=0.05, last_retry_s=0.5),
        mailbox,
        Identity.from_bytes((folder / "device.key").read_bytes()),
        tenant="home",
        me="kitchen",
        lookup={"coordinator": coordinator}.get,
        now=time.time,
        rng=random.Random(1),
        patience_s=5.0,
        ledger=ledger,
    )
    with courier:
        while mailbox.pending():
            time.sleep(0.01)
    ledger.close()
    mailbox.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
