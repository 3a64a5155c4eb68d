"""A device's settings: what each means, its unit, its range and why its default is what it is.

Knows the file `edge.toml`. Does not know what the settings are used for.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from edge_sdk.store.settings import absolute_path, read_config
from edge_sdk.wire.config_rules import NOTHING, parse_toml
from edge_sdk.wire.messages import Name

_Path = Annotated[str, Meta(max_length=4096)]
_Threads = Annotated[int, Meta(ge=0, le=1024)]


class DeviceSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the device keeps what it must not lose, and what it offers."""

    state_dir: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=4096,
            description="Folder for keys, mail, examples and models; made 0700 if absent.",
        ),
    ] = "symbiont-device"
    families: Annotated[
        tuple[Name, ...],
        Meta(
            max_length=64,
            description="Model families this device accepts; none means any that is offered.",
        ),
    ] = ()
    store_mb: Annotated[
        int,
        Meta(
            ge=16,
            le=1 << 20,
            description="Most MiB of messages waiting in either direction; "
            "must hold the largest model file twice while it arrives.",
        ),
    ] = 4096
    outbox_mb: Annotated[
        int,
        Meta(ge=1, le=1 << 20, description="Most MiB of messages waiting to leave; see when_full."),
    ] = 2048
    outbox_days: Annotated[
        float,
        Meta(gt=0, le=3650, description="A message is set aside after so many days at work."),
    ] = 60.0
    when_full: Annotated[
        Literal["refuse", "oldest"],
        Meta(
            description="A full outbox refuses what is new, or gives up the oldest waiting message "
            "of the same kind, of which only the newest is worth anything."
        ),
    ] = "refuse"
    hybrid: Annotated[
        bool,
        Meta(
            description="Also have an ML-KEM-768 + X25519 key: what is sent here is then sealed "
            "with suite 2, which a quantum computer of later years cannot open. Its encoding "
            "follows a draft, so it is off; it costs 1 KiB per message."
        ),
    ] = False


class LinkSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach the broker. The broker sees sealed bytes only."""

    broker: Annotated[
        str,
        Meta(
            pattern=r"^(mqtt|mqtts)://[^/@\s]+$",
            max_length=1024,
            description="mqtt://host:port or mqtts://host:port (TLS).",
        ),
    ] = "mqtt://127.0.0.1:1883"
    username: Annotated[
        str,
        Meta(max_length=256, description="Broker user; empty means the device's own name."),
    ] = ""
    password_file: Annotated[
        _Path, Meta(description="File holding the broker password; secrets are paths, not values.")
    ] = ""
    ca_file: Annotated[
        _Path, Meta(description="PEM file of the broker's authority; empty means the system's.")
    ] = ""
    mutual_tls: Annotated[
        bool,
        Meta(
            description="Ask for a certificate at enrolment and show it to the broker from then on "
            "(mqtts); renewed by itself."
        ),
    ] = False
    enrol_broker: Annotated[
        str,
        Meta(
            pattern=r"^((mqtt|mqtts)://[^/@\s]+)?$",
            max_length=1024,
            description="With mutual_tls: where to enrol, by password; empty means the broker.",
        ),
    ] = ""
    mqtt_version: Annotated[
        Literal["5", "3.1.1"],
        Meta(
            description="MQTT version tried first; the other follows by itself, "
            "but naming 3.1.1 for an older broker saves a second at each start.",
        ),
    ] = "5"
    window_kb: Annotated[
        int,
        Meta(
            ge=64,
            le=65_536,
            description="KiB on the way before an acknowledgement is awaited; "
            "1024 keeps a 100 Mbit/s link busy at 80 ms.",
        ),
    ] = 1024


class TrainSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What local training may take."""

    enabled: Annotated[
        bool, Meta(description="Whether this device trains at all; it can also only infer.")
    ] = True
    memory_mb: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 20,
            description="MiB training may take; weights are then kept packed, a step is taken in "
            "parts or activations are computed twice, as far as it must (slower), and what cannot "
            "fit is refused. 0 means no limit.",
        ),
    ] = 0
    threads: Annotated[
        _Threads,
        Meta(description="CPU threads for training; 0 means all. One leaves the device usable."),
    ] = 1
    max_tokens: Annotated[
        int,
        Meta(
            ge=8,
            le=32_768,
            description="Tokens per training example, longer ones are cut; "
            "memory grows with it and requests are short.",
        ),
    ] = 128
    max_steps: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Most optimizer steps accepted in one task, whatever the coordinator asks.",
        ),
    ] = 10_000
    seed: Annotated[
        int,
        Meta(
            ge=0,
            le=2**32 - 1,
            description="Added to each task's seed, so that devices differ and runs repeat.",
        ),
    ] = 0
    checkpoint_s: Annotated[
        float,
        Meta(
            ge=0,
            le=86_400,
            description="Seconds between checkpoints, from which a training goes on after a kill "
            "or a pause; a minute spares a flash disk. 0 means none.",
        ),
    ] = 60.0
    min_charge: Annotated[
        int,
        Meta(
            ge=0,
            le=101,
            description="Percent of battery below which training waits for mains; 101 means it "
            "never runs on battery, 0 that the battery does not matter.",
        ),
    ] = 0
    max_load: Annotated[
        float,
        Meta(
            ge=0,
            le=1000,
            description="Other runnable processes per core above which training waits; 0.5 leaves "
            "a busy device alone. 0 means never.",
        ),
    ] = 0.0
    uplink_bytes_per_round: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 40,
            description="Most bytes of an encoded update, for a metered link; the coordinator's "
            "own allowance counts where it is less. What does not fit is owed and sent later. "
            "0 means no limit.",
        ),
    ] = 0
    patience_s: Annotated[
        float,
        Meta(
            ge=0,
            le=604_800,
            description="A task that had to wait so long without a step is refused, so that its "
            "coordinator hears of it.",
        ),
    ] = 3600.0


class RuntimeSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What inference may take."""

    threads: Annotated[
        _Threads,
        Meta(description="CPU threads of ONNX Runtime; 0 means its own choice, often slower."),
    ] = 1
    max_tokens: Annotated[
        int,
        Meta(ge=1, le=32_768, description="Tokens generated when the caller names no number."),
    ] = 64
    cloud_drafts: Annotated[
        bool,
        Meta(
            description="Allow answers of the coordinator's model that this device drafts. Their "
            "prompts then leave it, as token ids sealed for the coordinator."
        ),
    ] = False
    probe_s: Annotated[
        float,
        Meta(
            ge=1,
            le=3600,
            description="Seconds a new model may take to load and answer in its trial process.",
        ),
    ] = 120.0
    probe_mb: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 20,
            description="MiB of address space of that trial process; "
            "0 means 4096 plus four times the bundle.",
        ),
    ] = 0
    operators: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=128)], ...],
        Meta(
            max_length=256,
            description="Operators allowed in models beside the usual ones: Name or domain:Name.",
        ),
    ] = ()


class DataSection(Struct, frozen=True, forbid_unknown_fields=True):
    """The device's own labelled text. It never leaves the device."""

    examples: Annotated[
        _Path,
        Meta(description="A .jsonl or .jsonl.xz file read once at the start; empty means none."),
    ] = ""
    text_column: Annotated[str, Meta(min_length=1, max_length=128, description="Its text.")] = (
        "text"
    )
    label_column: Annotated[str, Meta(min_length=1, max_length=128, description="Its label.")] = (
        "label"
    )
    held_out: Annotated[
        float,
        Meta(
            ge=0.0,
            le=0.9,
            description="Share kept from training to measure each model; "
            "a fifth gives a usable figure from a hundred examples.",
        ),
    ] = 0.2
    max_examples: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Most examples kept; the oldest go first, so storage stays bounded.",
        ),
    ] = 20_000


class EdgeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of one device; `EdgeConfig.load` reads them from TOML."""

    device: DeviceSection = DeviceSection()
    link: LinkSection = LinkSection()
    train: TrainSection = TrainSection()
    runtime: RuntimeSection = RuntimeSection()
    data: DataSection = DataSection()

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, object] = NOTHING) -> "EdgeConfig":
        """Return the settings in file `path`; relative paths in it start at its folder.

        Raises:
            ConfigError: unreadable, or any of `parse_toml`'s complaints.
        """
        path = Path(path)
        config = parse_toml(read_config(path), cls, str(path), overrides=overrides)
        return config.resolved(path.resolve().parent)

    def resolved(self, folder: Path) -> "EdgeConfig":
        """Return the same settings with every path made absolute, starting at `folder`."""

        absolute = partial(absolute_path, folder)
        replace = msgspec.structs.replace
        return replace(
            self,
            device=replace(self.device, state_dir=absolute(self.device.state_dir)),
            link=replace(
                self.link,
                password_file=absolute(self.link.password_file),
                ca_file=absolute(self.link.ca_file),
            ),
            data=replace(self.data, examples=absolute(self.data.examples)),
        )
