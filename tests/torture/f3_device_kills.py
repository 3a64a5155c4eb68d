"""F3: a device is killed with SIGKILL amid uploads and downloads, and sends little again.

Knows when to kill and how many bytes crossed the device's connection. Does not know what is right:
the history checker judges what both sides wrote down.

The device is a process behind a proxy that only counts. A kill falls after a random number of
bytes of the message in hand. What a message took beyond its own size and the frames around it,
divided by the kills during it, is what one kill cost; the worst message counts.
"""

import random
from pathlib import Path

from edge_sdk.link.broker import Broker, start_broker
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import File, decode
from edge_sdk.wire.transfer import WINDOW_BYTES
from tests.torture.children import Child
from tests.torture.history import Did, History, check
from tests.torture.parties import Headquarters, value_of
from tests.torture.proxy import Proxy, Roof, Way
from tests.torture.result import Result, Scale, say

NAME = "a"
KILLS = {Scale.SHORT: 2, Scale.FULL: 100}
"""In each direction."""
MESSAGE_BYTES = {Scale.SHORT: 6 * 2**20, Scale.FULL: 24 * 2**20}
STEP_BYTES = (2**20, 4 * 2**20)
"""How much of the message passes before the next kill."""
FRAME_SHARE = 1.01
"""A message takes its own size and 1 % of seals, frames and acknowledgements on the wire."""
SESSION_BYTES = 4_000
"""What a connection costs: CONNECT, the keys, an Offer of 400 chunks, a Want."""
ALLOWED_WINDOWS = 2.0
DEADLINE_S = 60.0
LOOK_S = 0.1
"""A message may be over before the next kill; looked at this often."""
CHILD = "tests.torture.device_child"


class Bench:
    """A broker, a coordinator that only sends and receives, and a proxy that counts."""

    def __init__(self, folder: Path, broker: Broker, proxy: Proxy) -> None:
        self.folder, self.history, self.proxy = folder, folder / "history", proxy
        self.url = broker.url_for(NAME).replace(f":{broker.port}", f":{proxy.port}")
        self.record = History(self.history / "coordinator.jsonl")
        link = MqttLink(broker.url_for("coordinator"), first_retry_s=0.02, last_retry_s=0.2)
        self.office = Headquarters(folder / "hq", link, (NAME,))
        self.office.courier.start()
        self.office.announce()

    def download(self, task: str, data: bytes) -> bytes:
        """Put a message for the device into the coordinator's outbox."""
        self.record(Did.SENT, update=f"{NAME}/{task}", value=value_of(data))
        return self.office.courier.send(NAME, File(task_id=task, path="p", data=data), task=task)

    def over(self, child: Child, stream: bytes) -> bool:
        """Whether the message in hand has been acknowledged."""
        if stream:
            return self.office.mailbox.posted(stream) is None
        return child.said("done")

    def book(self, way: Way, task: str) -> None:
        """Write down what the receiver's store now holds, as one aggregate, and put it away."""
        if way == "up":
            store = self.office.mailbox
        else:
            store = Mailbox(self.folder / "hq" / "devices" / f"{NAME}.db")
        parts = []
        for letter in store.unread():
            message = decode(letter.message)
            assert isinstance(message, File)
            parts.append((f"{NAME}/{message.task_id}", value_of(message.data)))
            store.mark_read(letter.id)
        self.record.aggregate(task, 0, parts)
        if way == "down":
            store.close()

    def device(self, *upload: object) -> Child:
        """Start the device's process."""
        arguments = [self.folder / "hq", self.history, self.url, NAME, *upload]
        return Child(CHILD, arguments, self.folder / "device.log")


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Upload and download under kills, and judge both."""
    rng = random.Random(seed)
    users = {name: f"{name}-secret" for name in (NAME, "coordinator")}
    with (
        start_broker(folder / "broker", users=users, prefer="mosquitto") as broker,
        Roof() as roof,
    ):
        proxy = Proxy(roof, broker.port, random.Random(seed))
        bench = Bench(folder, broker, proxy)
        up = _direction(bench, rng, scale, upload=True)
        down = _direction(bench, rng, scale, upload=False)
        bench.office.close()
        proxy.close()
    verdict = check(folder / "history")
    worst = max(*up, *down)
    return Result(
        code="F3",
        title="kill -9 of a device in upload and download",
        value={
            "kills": 2 * KILLS[scale],
            "worst_resent_windows_up": round(max(up), 2),
            "worst_resent_windows_down": round(max(down), 2),
        },
        unit="kills",
        goal="200 kills, each re-sends < 2 windows, 0 lost",
        passed=verdict.ok and not verdict.waiting and worst < ALLOWED_WINDOWS,
        lost=len(verdict.lost),
        doubled=len(verdict.doubled),
        notes={
            "history": str(verdict),
            "window_bytes": WINDOW_BYTES,
            "mean_resent_windows": round(sum(up + down) / len(up + down), 3),
        },
    )


def _direction(bench: Bench, rng: random.Random, scale: Scale, *, upload: bool) -> list[float]:
    """Kill in one direction; return for each message how many windows a kill made it cost."""
    size, kills, costs = MESSAGE_BYTES[scale], 0, []
    way: Way = "up" if upload else "down"
    number = 0
    while kills < KILLS[scale]:
        number += 1
        began = bench.proxy.passed[way]
        here = _message(bench, size, f"{way}-{number}", way, rng, KILLS[scale] - kills)
        extra = bench.proxy.passed[way] - began - size * FRAME_SHARE - (here + 1) * SESSION_BYTES
        if not here:
            continue
        kills += here
        costs.append(max(0.0, extra) / here / WINDOW_BYTES)
        say("F3", f"{way}: {kills} of {KILLS[scale]} kills, {costs[-1]:.2f} windows a kill")
    return costs


def _message(bench: Bench, size: int, task: str, way: Way, rng: random.Random, most: int) -> int:
    """Bring one message over; return how often the device was killed meanwhile."""
    data = random.Random(task).randbytes(size)
    upload = [size, task] if way == "up" else []
    stream = b"" if upload else bench.download(task, data)
    child = bench.device(*upload)
    kills = 0
    while kills < most:
        child.wait_for("connected", DEADLINE_S)
        mark = bench.proxy.mark(way, rng.randint(*STEP_BYTES))
        while not (over := bench.over(child, stream)) and not mark.wait(LOOK_S):
            continue
        if over:
            break
        child.kill()
        kills += 1
        child = bench.device(*upload)
    if upload:
        child.wait_for("done", DEADLINE_S)
    else:
        bench.office.courier.wait_until_done(stream, DEADLINE_S)
        bench.record(Did.DONE, update=f"{NAME}/{task}")
    child.end(DEADLINE_S)
    bench.book(way, task)
    return kills
