"""One end of a long transfer as a process, to be killed.

Usage: python -m tests.torture.device_child FOLDER HISTORY URL NAME [UPLOAD_BYTES TASK]

Knows its own store and its standard streams: it prints `connected`, `done` when its outbox became
empty. With UPLOAD_BYTES a message of that size is put
into the outbox first, unless an earlier process did. The end of standard input ends it.
"""

import random
import sys
import threading
import time
from pathlib import Path

from edge_sdk.link.courier import Courier
from edge_sdk.link.keys import CoordinatorKeys
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.keys import load_or_create
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.enrolment import root_key_hash
from edge_sdk.wire.messages import File
from tests.torture.history import Did, History, read
from tests.torture.parties import TENANT, value_of

LOOK_S = 0.05


def main(folder: Path, history: Path, url: str, name: str, size: str = "0", task: str = "") -> None:
    """Run until standard input ends."""
    root = load_or_create(folder / "root.key").public
    keys = CoordinatorKeys(TENANT, root_key_hash(root), now=time.time)
    mailbox = Mailbox(folder / "devices" / f"{name}.db")
    record = History(history / f"{name}.jsonl")
    link = MqttLink(url, first_retry_s=0.02, last_retry_s=0.2)
    courier = Courier(
        link,
        mailbox,
        load_or_create(folder / "devices" / f"{name}.key"),
        tenant=TENANT,
        me=name,
        lookup=keys.lookup,
        now=time.time,
        rng=random.Random(name),
        keys=keys.receive,
        patience_s=0.5,
    )
    link.on_connect(lambda: print("connected", flush=True))
    if int(size) and not _sent_before(history, name, f"{name}/{task}"):
        data = random.Random(task).randbytes(int(size))
        record(Did.SENT, update=f"{name}/{task}", value=value_of(data))
        courier.send("coordinator", File(task_id=task, path="p", data=data), task=task)
    over = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    sending = bool(int(size))
    with courier:
        while not over.is_set():
            if sending and not mailbox.pending():
                sending = False
                record(Did.DONE, update=f"{name}/{task}")
                print("done", flush=True)
            with courier.mail:
                courier.mail.wait(LOOK_S)
    mailbox.close()


def _sent_before(history: Path, name: str, update: str) -> bool:
    lines = read(history)[0].get(name, [])
    return any(line["did"] == Did.SENT and line["update"] == update for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
