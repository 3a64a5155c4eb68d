"""A coordinator's end of the wire for tests of a device: real keys, real releases, no programs."""

import atexit
import functools
import hashlib
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compression.codec import Compressor, Layout
from edge_sdk.agent import EdgeDevice
from edge_sdk.collect import Example
from edge_sdk.config import EdgeConfig
from edge_sdk.link.courier import Courier, part
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.config_rules import parse_toml
from edge_sdk.wire.enrolment import EnrolmentCode, root_key_hash, sign_bundle
from edge_sdk.wire.messages import (
    AnyMessage,
    Enrol,
    Enrolled,
    File,
    OfferModel,
    TextTask,
    TrainAdapter,
    WantFiles,
    decode,
)
from edge_sdk.wire.seal import Identity, PublicIdentity
from exporters.bundle import write_adapter_release
from exporters.publisher import Publisher
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny

TENANT = "home"
TASK = TextTask(
    name="kind",
    prompt="Request: {text}\nKind:",
    generation_prompt="A request ({label}):",
    labels=("open", "list", "name"),
    words=(" open", " list", " name"),
)
"""Three labels whose words share their first byte-token, a space: summed scores are needed."""


def example_set(n: int) -> list[Example]:
    """n seeded labelled texts with distinct words."""
    rng = random.Random(5)
    return [
        Example(f"{label} request {i} {rng.randrange(1000)}", label)
        for i in range(n)
        for label in [TASK.labels[i % 3]]
    ]


def releases(folder: Path) -> Publisher:
    """A copy in `folder` of `publish_releases`, which is made once per test run."""
    return Publisher(Path(shutil.copytree(_published().folder, folder / "repository")))


@functools.cache
def _published() -> Publisher:
    folder = Path(tempfile.mkdtemp(prefix="symbiont-releases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return publish_releases(folder)


def publish_releases(folder: Path) -> Publisher:
    """A signed repository with the bundle r1, the adapter release a1 for it, and the bundle r2."""
    publisher = Publisher(folder / "repository")
    publisher.init()
    exact = SlmOptions(accuracy_level=1)
    save_tiny(folder / "hf1")
    save_tiny(folder / "hf2", intermediate_size=64)
    for hf, release in (("hf1", "r1"), ("hf2", "r2")):
        manifest = export_slm(
            folder / hf, folder / release, family="tiny", release=release, task=TASK, options=exact
        )
        if release == "r1":
            base = manifest
        publisher.publish("tiny", release, folder / release)
    rng = np.random.default_rng(0)
    factors = {}
    for name, (out_features, in_features) in base.adapter_slots.items():
        if name.endswith("q_proj"):
            factors[name + ".lora_A"] = rng.normal(size=(2, in_features)).astype(np.float32)
            factors[name + ".lora_B"] = rng.normal(size=(out_features, 2)).astype(np.float32)
    write_adapter_release(folder / "a1", base, factors, release="a1", rank=2, alpha=4.0)
    publisher.publish("tiny", "a1", folder / "a1")
    return publisher


def offer(publisher: Publisher, release: str, task_id: str = "") -> OfferModel:
    """The offer of one published release."""
    targets = publisher.releases()[f"tiny/{release}"]
    return OfferModel(task_id or f"offer-{release}", "tiny", release, publisher.metadata(), targets)


def order(release: str = "r1", task_id: str = "train-0", **changes: object) -> TrainAdapter:
    """A small training task with the plain codec for rank 2 on q_proj."""
    codec = codec_for_rank_2()
    settings: dict[str, object] = {
        "task_id": task_id,
        "round": 0,
        "family": "tiny",
        "release": release,
        "adapter": b"",
        "adapter_seed": 1,
        "rank": 2,
        "alpha": 4.0,
        "targets": ("q_proj",),
        "codec_id": codec.codec_id,
        "codec": codec.to_bytes(),
        "steps": 4,
        "batch": 4,
        "lr": 0.01,
        "synthetic_weight": 0.0,
        "bytes_target": 0,
        "seed": 3,
    }
    return TrainAdapter(**{**settings, **changes})  # type: ignore[arg-type]


def codec_for_rank_2() -> Compressor:
    """The dead-zone codec for the factors of `order`."""
    names = [
        f"model.layers.{i}.self_attn.q_proj.lora_{half}" for i in range(2) for half in ("A", "B")
    ]
    shapes = [(2, 64) if name.endswith("A") else (64, 2) for name in names]
    return Compressor.deadzone(Layout(tuple(names), tuple(shapes)))


def config(folder: Path, text: str = "") -> EdgeConfig:
    """Settings of a device whose state is in `folder`; `text` is more TOML."""
    overrides = {"device.state_dir": str(folder / "state")}
    return parse_toml(text, EdgeConfig, "test", overrides=overrides)


@dataclass
class Coordinator:
    """Issues codes, admits devices, sends files that are asked for and collects the rest."""

    folder: Path
    publisher: Publisher
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    devices: dict[str, PublicIdentity] = field(default_factory=dict)
    replies: list[AnyMessage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root, self.identity = Identity.generate(), Identity.generate()
        self.secrets: dict[str, bytes] = {}
        self.mailbox = Mailbox(self.folder / "coordinator.db")
        self.courier = Courier(
            self.broker.link("coordinator"),
            self.mailbox,
            self.identity,
            tenant=TENANT,
            me="coordinator",
            lookup=self.devices.get,
            now=time.time,
            rng=random.Random(1),
            admit=self._admit,
        )
        self.courier.start()
        self.announce()

    def announce(self, version: int = 1) -> None:
        """Retain the key bundle."""
        issued = int(time.time())
        bundle = sign_bundle(
            self.root,
            self.identity.public,
            tenant=TENANT,
            version=version,
            expires_s=issued + 3600,
            issued_s=issued,
        )
        self.courier.announce_keys(bundle)

    def code(self, device: str, *, secret: bytes = b"s" * 16, lifetime_s: int = 600) -> str:
        """A one-time code for `device`."""
        token = f"token-{device}-{len(self.secrets)}"
        self.secrets[token] = secret
        return EnrolmentCode(
            token,
            secret,
            TENANT,
            device,
            root_key_hash(self.root.public),
            int(time.time()) + lifetime_s,
        ).to_text()

    def _admit(self, request: Enrol, keys: PublicIdentity) -> None:
        from edge_sdk.errors import EnrolmentError

        if self.secrets.pop(request.token_id, None) != request.secret:
            raise EnrolmentError("the enrolment code was used already")
        self.devices[request.device] = keys

    def turn(self) -> None:
        """Answer what is in the mailbox."""
        for letter in self.mailbox.unread():
            message = decode(letter.message)
            self.mailbox.mark_read(letter.id)
            match message:
                case Enrol():
                    answer = Enrolled(message.device, self.publisher.root(), TASK)
                    self.courier.send(message.device, answer, task=letter.task)
                case WantFiles():
                    self.replies.append(message)
                    for path in message.paths:
                        data = self.publisher.read(path)
                        self.send(letter.sender, File(message.task_id, path, data), path)
                case _:
                    self.replies.append(message)

    def send(self, device: str, message: AnyMessage, name: str = "") -> None:
        """Send a task; `name` tells several messages of one task apart."""
        task = str(getattr(message, "task_id"))  # noqa: B009 - enrolments have none
        self.courier.send(device, message, task=part(task, name) if name else task)

    def talk(self, device: EdgeDevice, *, until: int, timeout_s: float = 60.0) -> list[AnyMessage]:
        """Let both sides work until `until` replies are here; return them all."""
        deadline = time.monotonic() + timeout_s
        while len(self.replies) < until:
            assert time.monotonic() < deadline, f"only {self.replies} arrived"
            device.step(timeout_s=0.02)
            self.courier.wait_for_mail(0.02)
            self.turn()
        return self.replies

    def close(self) -> None:
        self.courier.close()
        self.mailbox.close()


def fingerprint(folder: Path) -> str:
    """A hash over every file below `folder`, to show that nothing changed."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
