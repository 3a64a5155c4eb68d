"""A device's transport alone, in a process of its own: it downloads a large file.

Knows courier, mailbox and the store that received parts go to. Does not load a model runtime; what
is measured is what the transport adds to its imports. Run as
`python -m tests.torture.download FOLDER URL BYTES`.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

from edge_sdk.link.courier import Courier
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.models import ModelStore
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import File, decode
from edge_sdk.wire.seal import Identity, PublicIdentity
from tests.torture.upload import TENANT, peak_mb


def main(folder: Path, url: str, size: int) -> None:
    """Download until all parts are here; write what it took to `folder`/device.json."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: imports are not counted
    baseline = peak_mb()
    coordinator = PublicIdentity.from_bytes((folder / "coordinator.pub").read_bytes())
    mailbox = Mailbox(folder / "device.db")
    store = ModelStore(folder / "models", root=b"", probe=lambda _held: None)
    courier = Courier(
        MqttLink(url, first_retry_s=0.1, last_retry_s=1.0),
        mailbox,
        Identity.from_bytes((folder / "device.key").read_bytes()),
        tenant=TENANT,
        me="device",
        lookup={"coordinator": coordinator}.get,
        now=time.time,
        rng=random.Random(1),
    )
    began, whole = time.monotonic(), False
    with courier:
        while not whole:
            for letter in mailbox.unread():
                message = decode(letter.message)
                assert isinstance(message, File)
                whole = store.put_piece(
                    message.path, message.data, offset=message.offset, size=message.size
                )
                mailbox.mark_read(letter.id)
            courier.wait_for_mail(0.1)
        deadline = time.monotonic() + 2.0  # the last Done
        while time.monotonic() < deadline:
            time.sleep(0.1)
    mailbox.close()
    told = {"baseline_mb": baseline, "peak_mb": peak_mb(), "seconds": time.monotonic() - began}
    draft = folder / "device.json.new"
    draft.write_text(json.dumps(told))
    os.replace(draft, folder / "device.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
