"""A coordinator and devices in one process: real couriers and mailboxes over a memory broker."""

import hashlib
import io
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.events import Events
from coordinator.fleet import Fleet
from coordinator.registry import Registry
from coordinator.replies import MOST_BYTES
from coordinator.runner import Runner
from coordinator.store import Store
from edge_sdk.link.courier import Courier
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.manifest import FileEntry, ReleaseManifest, encode_manifest
from edge_sdk.wire.messages import (
    AdapterUpdate,
    AnyMessage,
    Enrol,
    Enrolled,
    TextTask,
    TrainAdapter,
    decode,
)
from edge_sdk.wire.seal import Identity
from exporters.publisher import Publisher

TASK = TextTask(
    name="kinds",
    prompt="Request: {text}\nKind:",
    generation_prompt="Kind: {label}\nRequest:",
    labels=("sum", "story"),
    words=(" sum", " story"),
)
TENANT = "home"
SOON_S = 10.0

Behaviour = Callable[[AnyMessage], list[AnyMessage]]


def train(round_: int, **changes: object) -> TrainAdapter:
    fields: dict[str, object] = {
        "task_id": "any",
        "round": round_,
        "family": "slm",
        "release": "base",
        "adapter": b"",
        "adapter_seed": 1,
        "rank": 2,
        "alpha": 4.0,
        "targets": ("q_proj",),
        "codec_id": "identity",
        "codec": b"",
        "steps": 1,
        "batch": 1,
        "lr": 0.01,
        "synthetic_weight": 0.5,
        "bytes_target": 0,
        "seed": round_,
    }
    return TrainAdapter(**{**fields, **changes})


def update(task: TrainAdapter, *, codes: bytes = b"codes", **changes: object) -> AdapterUpdate:
    fields: dict[str, object] = {
        "task_id": task.task_id,
        "round": task.round,
        "release": task.release,
        "codec_id": task.codec_id,
        "codes": codes,
        "examples": 3,
        "raw_bytes": 100,
        "cosine": 0.9,
        "seconds": {"train": 0.1},
        "peak_mb": 10.0,
    }
    return AdapterUpdate(**{**fields, **changes})


def obedient(message: AnyMessage) -> list[AnyMessage]:
    return [update(message)] if isinstance(message, TrainAdapter) else []


class Coordinator:
    """The service's parts without models: store, fleet, registry, runner, courier."""

    def __init__(self, folder: Path, broker: MemoryBroker) -> None:
        folder.mkdir(exist_ok=True)
        key = folder / "key"
        if not key.exists():
            key.write_bytes(Identity.generate().to_bytes())
        self.identity = Identity.from_bytes(key.read_bytes())
        self.mailbox = Mailbox(folder / "coordinator.db")
        self.store = Store(self.mailbox, time.time)
        self.fleet = Fleet(self.store, tenant=TENANT, now=time.time)
        self.registry = Registry(self.store, Publisher(folder / "releases"), time.time)
        self.registry.prepare()
        self.stream = io.StringIO()
        self.events = Events(time.time, stream=self.stream, store=self.store)
        self.runner = Runner(self.store, self.fleet, self.registry, self.events, task=TASK)
        self.courier = Courier(
            broker.link("coordinator"),
            self.mailbox,
            self.identity,
            tenant=TENANT,
            me="coordinator",
            lookup=self.fleet.lookup,
            now=time.time,
            rng=random.Random(0),
            accept=self.runner.accept,
            admit=self.fleet.admit,
            progress=self.runner.progress,
            refused=self.runner.refused,
            limits=MOST_BYTES,
            patience_s=0.2,
        )

    def start(self) -> "Coordinator":
        self.courier.start()
        self.runner.start_mail(self.courier)
        return self

    def close(self) -> None:
        self.runner.close()
        self.courier.close()
        self.mailbox.close()

    def told(self, name: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.stream.getvalue().splitlines()]
        return [line for line in lines if line["event"] == name]


class FakeDevice:
    """A device that answers each message with what `behave` says; its store is real."""

    def __init__(
        self,
        name: str,
        folder: Path,
        broker: MemoryBroker,
        coordinator: Identity,
        identity: Identity | None = None,
        behave: Behaviour | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.name, self.behave = name, behave or obedient
        self.seen: list[AnyMessage] = []
        self.mailbox = Mailbox(folder / f"{name}.db")
        self.identity = identity or Identity.generate()
        self.courier = Courier(
            broker.link(name),
            self.mailbox,
            self.identity,
            tenant=TENANT,
            me=name,
            lookup={"coordinator": coordinator.public}.get,
            now=time.time,
            rng=random.Random(1),
            patience_s=0.2,
        )
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.courier.start()
        self._thread.start()

    def enrol(self, fleet: Fleet, *, timeout_s: float = SOON_S) -> None:
        code = fleet.token(self.name, root_key_hash=bytes(32))
        self.courier.enrol(self.enrolment(code.token_id, code.secret), timeout_s=timeout_s)

    def enrolment(self, token_id: str, secret: bytes) -> Enrol:
        public = self.identity.public
        return Enrol(token_id, secret, self.name, public.sign, public.receive, (), 512)

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self.courier.close()
        self.mailbox.close()

    def tasks(self) -> list[AnyMessage]:
        return [m for m in self.seen if not isinstance(m, Enrolled)]

    def _serve(self) -> None:
        while not self._closing:
            self.courier.wait_for_mail(0.02)
            for letter in self.mailbox.unread():
                message = decode(letter.message)
                self.seen.append(message)
                with self.mailbox.transaction():
                    for reply in self.behave(message):
                        self.courier.send("coordinator", reply, task=letter.task)
                    self.mailbox.mark_read(letter.id)


def release_folder(folder: Path, release: str, *, data: bytes = b"weights") -> Path:
    """A small folder that the publisher takes for a release."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(data)
    entry = FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    manifest = ReleaseManifest(
        family="slm",
        release=release,
        kind="decoder",
        base_model="none",
        architecture="none",
        context=8,
        tokenizer_sha256="0" * 64,
        files={"model.onnx": entry},
    )
    (folder / "symbiont.json").write_bytes(encode_manifest(manifest))
    return folder


def until(condition: Callable[[], object], timeout_s: float = SOON_S) -> None:
    """Wait for something that other threads bring about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
