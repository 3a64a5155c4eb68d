"""A thousand simulated devices in few processes, one real coordinator, one real broker, one round.

Knows just enough MQTT 3.1.1 to be many clients in one event loop, and the device's side of a round:
take the task, seal an update, send it chunk by chunk, wait for the signed Done. Does not simulate
anything else: envelopes, transfer rules, fleet, runner, store and broker are the product's.

Run as `python -m tests.torture.swarm coordinator|NUMBER SETUP` for the processes.
"""

import asyncio
import json
import os
import random
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edge_sdk.link.broker import start_broker
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.wire.enrolment import root_key_hash
from edge_sdk.wire.messages import Enrol, TrainAdapter, decode, encode
from edge_sdk.wire.seal import Identity, Opener, PublicIdentity, new_stream, read_manifest, seal
from edge_sdk.wire.transfer import (
    Chunk,
    Done,
    Frame,
    Have,
    Incoming,
    Offer,
    Outgoing,
    Reject,
    Slow,
    Want,
    decode_frame,
    encode_frame,
    sign_done,
)
from tests.torture.history import Did, History, Verdict, check
from tests.torture.parties import RUN, TENANT, Headquarters, counting, update_of, value_of
from tests.torture.result import say
from tests.torture.upload import peak_mb

ROOT = Path(__file__).resolve().parent.parent.parent
UPDATE_BYTES = 256 * 1024
LIMIT_S = 240.0
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What the processes are told."""

    folder: str
    port: int
    coordinator_url: str
    devices: int
    processes: int
    seed: int
    within_s: float


@dataclass(slots=True)
class Measured:
    """One round: `seconds` from the Ask to the commit of the aggregate with every update."""

    seconds: float
    replies: int
    ack_p50_s: float
    ack_p99_s: float
    sent_per_byte: float
    coordinator_mb: float
    broker_mb: float
    verdict: Verdict


def swarm(folder: Path, *, devices: int, processes: int, seed: int, code: str = "L3") -> Measured:
    """Run one round and return what was measured."""
    names = [_name(number) for number in range(devices)]
    users = {"coordinator": "c-secret"} | {name: _password(name) for name in names}
    broker = start_broker(folder / "broker", users=users, prefer="mosquitto")
    setup = Setup(
        str(folder), broker.port, broker.url_for("coordinator"), devices, processes, seed, 120.0
    )
    (folder / "history").mkdir()
    (folder / "setup.json").write_text(json.dumps(asdict(setup)))
    children = []
    try:
        children = [_start(str(number), folder) for number in range(processes)]
        _wait_for_files(children, [folder / f"keys-{number}" for number in range(processes)])
        say(code, f"{devices} devices have keys")
        children.append(_start("coordinator", folder))
        children[-1].wait(LIMIT_S)
        broker_mb = peak_mb(broker.pid)
        for child in children:
            child.wait(30.0)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        broker.close()
    told = json.loads((folder / "coordinator.json").read_text())
    swarms = [json.loads((folder / f"{n}.json").read_text()) for n in range(processes)]
    acks = sorted(ack for one in swarms for ack in one["acks"])
    return Measured(
        seconds=told["seconds"],
        replies=told["replies"],
        ack_p50_s=acks[len(acks) // 2],
        ack_p99_s=acks[int(len(acks) * 0.99)],
        sent_per_byte=sum(one["sent"] for one in swarms) / (devices * UPDATE_BYTES),
        coordinator_mb=told["peak_mb"],
        broker_mb=broker_mb,
        verdict=check(folder / "history"),
    )


def _start(role: str, folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.torture.swarm", role, str(folder / "setup.json")]
    return subprocess.Popen(command, cwd=ROOT)


def _wait_for_files(children: list["subprocess.Popen[bytes]"], files: list[Path]) -> None:
    while not all(file.exists() for file in files):
        if any(child.poll() is not None for child in children):
            raise RuntimeError("a process of the swarm ended too early")
        time.sleep(0.05)


def _name(number: int) -> str:
    return f"device-{number}"


def _password(name: str) -> str:
    return f"secret-of-{name}"


# --- the coordinator's process --------------------------------------------------------------------


def _coordinate(setup: Setup) -> None:
    folder = Path(setup.folder)
    keys: dict[str, str] = {}
    for number in range(setup.processes):
        keys |= json.loads((folder / f"keys-{number}").read_text())
    link = MqttLink(setup.coordinator_url, first_retry_s=0.1, last_retry_s=1.0)
    hq = Headquarters(folder / "hq", link, ())
    with hq.mailbox.transaction():  # one by one this would be a thousand commits
        for name, public_hex in keys.items():
            public = PublicIdentity.from_bytes(bytes.fromhex(public_hex))
            code = hq.fleet.token(name, root_key_hash=root_key_hash(hq.root.public))
            wish = Enrol(code.token_id, code.secret, name, public.sign, public.receive, (), 512)
            hq.fleet.admit(wish, public)
    _write(folder / "coordinator.key.pub", hq.identity.public.to_bytes().hex())
    asked = 0.0
    with History(folder / "history" / "coordinator.jsonl") as history:
        hq.start()
        link.connect(wait_s=10.0)
        _wait_for_files([], [folder / f"ready-{n}" for n in range(setup.processes)])
        asked = time.monotonic()
        devices = tuple(keys)
        program = counting(
            devices,
            history,
            need=len(devices),
            within_s=setup.within_s,
            over=lambda step: step >= 1,
        )
        hq.runner.run(program, run=RUN)
        seconds = time.monotonic() - asked
        time.sleep(1.0)  # the last Dones
        hq.account(history)
        with hq.store.transaction() as db:
            (replies,) = db.execute("SELECT count(*) FROM consumed").fetchone()
        hq.close()
    told = {"seconds": seconds, "replies": replies, "peak_mb": peak_mb()}
    _write(folder / "coordinator.json", json.dumps(told))


def _write(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".new")
    draft.write_text(text)
    os.replace(draft, path)


# --- the devices' processes -----------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    acks: list[float] = field(default_factory=list)
    sent: int = 0
    ready: int = 0
    open: int = 0


class _Device:
    """One simulated device: a connection and at most one message each way."""

    def __init__(self, name: str, setup: Setup, tally: _Tally, history: History) -> None:
        self.name, self.setup, self.tally, self.history = name, setup, tally, history
        self.identity = Identity.generate()
        self.coordinator: PublicIdentity
        self.finished = asyncio.Event()
        self._incoming: Incoming | None = None
        self._pieces: dict[int, bytes] = {}
        self._taken: dict[bytes, bytes] = {}  # stream -> digest
        self._outgoing: Outgoing | None = None
        self._update = ""
        self._sent_at: dict[int, float] = {}
        self._due = float("inf")
        self._packet = 0

    async def live(self) -> None:
        """Connect, take the task, send the update, leave."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.setup.port)
        await self._greet()
        self.tally.ready += 1
        timer = asyncio.create_task(self._remind())
        try:
            while not self.finished.is_set():
                kind, body = await self._receive()
                if kind >> 4 == 3:
                    self._on_publish(kind, body)
                    await self._writer.drain()
        finally:
            timer.cancel()
            self._writer.close()

    async def _remind(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self._outgoing is not None and time.monotonic() > self._due:
                self._send(self._outgoing.resend())

    # --- MQTT 3.1.1 -----------------------------------------------------------------------------

    async def _greet(self) -> None:
        words = b"".join(_text(word) for word in (self.name, self.name, _password(self.name)))
        self._write(0x10, _text("MQTT") + bytes([4, 0xC2]) + struct.pack(">H", 600) + words)
        await self._receive()
        topic = f"v1/{TENANT}/{self.name}/down"
        self._write(0x82, struct.pack(">H", self._next()) + _text(topic) + b"\1")
        await self._receive()

    async def _receive(self) -> tuple[int, bytes]:
        kind = (await self._reader.readexactly(1))[0]
        size = shift = 0
        while True:
            byte = (await self._reader.readexactly(1))[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return kind, await self._reader.readexactly(size)

    def _on_publish(self, kind: int, body: bytes) -> None:
        (length,) = struct.unpack_from(">H", body)
        at = 2 + length
        if kind & 6:
            self._write(0x40, body[at : at + 2])
            at += 2
        if len(body) > at:
            self._take(decode_frame(body[at:]))

    def _publish(self, frame: Frame) -> None:
        payload = encode_frame(frame)
        self.tally.sent += len(payload)
        head = _text(f"v1/{TENANT}/{self.name}/up") + struct.pack(">H", self._next())
        self._write(0x32, head, payload)

    def _write(self, kind: int, *parts: bytes) -> None:
        size = sum(map(len, parts))
        length = bytearray()
        while True:
            size, low = size >> 7, size & 0x7F
            length.append(low | (0x80 if size else 0))
            if not size:
                break
        self._writer.write(b"".join((bytes([kind]), bytes(length), *parts)))

    def _next(self) -> int:
        self._packet = self._packet % 65_535 + 1
        return self._packet

    # --- the round ------------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        match frame:
            case Offer():
                self._on_offer(frame)
            case Chunk() if self._incoming is not None:
                self._on_chunk(frame, self._incoming)
            case Want() | Have() | Done() | Reject() | Slow():
                self._on_answer(frame)

    def _on_offer(self, offer: Offer) -> None:
        manifest = read_manifest(
            offer.manifest,
            self.coordinator,
            tenant=TENANT,
            sender_id="coordinator",
            recipient_id=self.name,
        )
        if offer.stream in self._taken:
            self._publish(sign_done(offer.stream, manifest.digest, self.identity))
            return
        opener = Opener(manifest, self.identity)
        self._incoming = Incoming(manifest, opener, max_bytes=1 << 20)
        self._publish(self._incoming.want())

    def _on_chunk(self, chunk: Chunk, incoming: Incoming) -> None:
        received = incoming.receive(chunk)
        if received.piece is not None:
            self._pieces[chunk.index] = received.piece
        for frame in received.reply:
            self._publish(frame)
        if received.complete:
            manifest = incoming.manifest
            self._taken[chunk.stream] = manifest.digest
            self._publish(sign_done(chunk.stream, manifest.digest, self.identity))
            task = decode(b"".join(self._pieces[i] for i in range(len(self._pieces))))
            self._incoming, self._pieces = None, {}
            assert isinstance(task, TrainAdapter)
            self._answer(task)

    def _answer(self, task: TrainAdapter) -> None:
        rng = random.Random(f"{self.setup.seed} {self.name}")
        codes = rng.randbytes(UPDATE_BYTES)
        self._update = f"{self.name}/{task.task_id}"
        self.history(Did.SENT, update=self._update, value=value_of(codes))
        now_s, stream = int(time.time()), new_stream()
        sealed = seal(
            encode(update_of(task, codes)),
            tenant=TENANT,
            sender_id=self.name,
            recipient_id="coordinator",
            kind="AdapterUpdate",
            task=task.task_id,
            stream=stream,
            sequence=1,
            created_s=now_s,
            expires_s=now_s + 3_600,
            sender=self.identity,
            recipient=self.coordinator,
        )
        self._outgoing = Outgoing(stream, sealed, self.coordinator)
        self._send(self._outgoing.start())

    def _on_answer(self, frame: Want | Have | Done | Reject | Slow) -> None:
        if self._outgoing is None or frame.stream != self._outgoing.stream:
            return
        frames = self._outgoing.receive(frame)
        now = time.monotonic()
        if isinstance(frame, Have | Done):
            held = frame.held if isinstance(frame, Have) else self._sent_at.keys()
            for index in [index for index in self._sent_at if index in held]:
                self.tally.acks.append(now - self._sent_at.pop(index))
        if self._outgoing.done:
            self.history(Did.DONE, update=self._update)
            self._outgoing = None
            self.finished.set()
        elif self._outgoing.rejected is not None:
            self.history(Did.PARKED, update=self._update, reason=self._outgoing.rejected.reason)
            self._outgoing = None
            self.finished.set()
        elif isinstance(frame, Slow):
            self._due = now + frame.wait_s
        else:
            self._send(frames)

    def _send(self, frames: list[Frame]) -> None:
        now = time.monotonic()
        for frame in frames:
            if isinstance(frame, Chunk):
                self._sent_at.setdefault(frame.index, now)
            self._publish(frame)
        self._due = now + _PATIENCE_S


def _text(word: str) -> bytes:
    return struct.pack(">H", len(word)) + word.encode()


async def _swarm(setup: Setup, number: int) -> None:
    folder = Path(setup.folder)
    tally = _Tally()
    with History(folder / "history" / f"swarm-{number}.jsonl") as history:
        devices = [
            _Device(_name(n), setup, tally, history)
            for n in range(number, setup.devices, setup.processes)
        ]
        public = {one.name: one.identity.public.to_bytes().hex() for one in devices}
        _write(folder / f"keys-{number}", json.dumps(public))
        key_file = folder / "coordinator.key.pub"
        while not key_file.exists():
            await asyncio.sleep(0.05)
        coordinator = PublicIdentity.from_bytes(bytes.fromhex(key_file.read_text()))
        lives = []
        for one in devices:
            one.coordinator = coordinator
            lives.append(asyncio.create_task(one.live()))
            if len(lives) % 50 == 0:
                await asyncio.sleep(0.05)
        while tally.ready < len(devices):
            await asyncio.sleep(0.05)
        _write(folder / f"ready-{number}", "")
        done, late = await asyncio.wait(lives, timeout=setup.within_s + 30.0)
        for life in late:
            life.cancel()
        for life in done:
            life.result()
    _write(folder / f"{number}.json", json.dumps({"acks": tally.acks, "sent": tally.sent}))


def main(role: str, setup_file: str) -> None:
    """One of the processes."""
    setup = Setup(**json.loads(Path(setup_file).read_text()))
    if role == "coordinator":
        _coordinate(setup)
    else:
        asyncio.run(_swarm(setup, int(role)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
