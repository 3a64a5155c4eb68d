"""The coordinator's settings: the whole file, its broker, families and texts.

Knows the file `coordinator.toml`; how it learns is set in learning_config.py. Does not know what
the settings are used for.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from coordinator.learning_config import (
    AdapterSection,
    DefenceSection,
    FedMktSection,
    LlmSection,
    PathText,
    ProgramSection,
)
from coordinator.rollout_plan import Plan
from edge_sdk.errors import ConfigError
from edge_sdk.store.settings import absolute_path, read_config
from edge_sdk.wire.config_rules import NOTHING, parse_toml
from edge_sdk.wire.messages import Name, TextTask

__all__ = [
    "AdapterSection",
    "CoordinatorConfig",
    "DefenceSection",
    "FamilySection",
    "FedMktSection",
    "LlmSection",
    "ProgramSection",
    "ServiceSection",
    "TextsSection",
]


class ServiceSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Who this coordinator is, where it keeps what it must not lose, and its broker."""

    tenant: Annotated[
        Name, Meta(description="First part of all topics; one coordinator serves one tenant.")
    ]
    state_dir: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=4096,
            description="Folder for keys, database and releases; made 0700 if absent.",
        ),
    ] = "state"
    broker: Annotated[
        str,
        Meta(
            pattern=r"^(mqtt|mqtts)://[^/@\s]+$",
            max_length=1024,
            description="mqtt://host:port or mqtts://host:port (TLS).",
        ),
    ] = "mqtt://127.0.0.1:1883"
    username: Annotated[str, Meta(max_length=256, description="Broker user.")] = "coordinator"
    password_file: Annotated[
        PathText,
        Meta(description="File holding the broker password; secrets are paths, not values."),
    ] = ""
    ca_file: Annotated[
        PathText, Meta(description="PEM file of the broker's authority; empty means the system's.")
    ] = ""
    cert_file: Annotated[
        PathText, Meta(description="PEM certificate to show the broker (mTLS); empty means none.")
    ] = ""
    key_file: Annotated[PathText, Meta(description="Its private key.")] = ""
    broker_dir: Annotated[
        PathText,
        Meta(
            description="Folder that `symbiont broker config` made, if the broker runs here: "
            "`device token` and `device revoke` then let devices in and throw them out."
        ),
    ] = ""
    mqtt_version: Annotated[
        Literal["5", "3.1.1"],
        Meta(description="MQTT version tried first; the other follows by itself."),
    ] = "5"
    enrolment: Annotated[
        Literal["token", "approve"],
        Meta(
            description="token: a good code lets a device in; "
            "approve: it then waits for `symbiont device approve`."
        ),
    ] = "token"
    certificate_days: Annotated[
        int,
        Meta(
            ge=1,
            le=825,
            description="Days a device's broker certificate lasts (mTLS); renewed after two "
            "thirds. A device that is away longer needs a new code.",
        ),
    ] = 30
    store_mb: Annotated[
        int,
        Meta(
            ge=64,
            le=1 << 22,
            description="Most MiB of messages in the database; a bundle is stored once for all.",
        ),
    ] = 4096
    hybrid: Annotated[
        bool,
        Meta(
            description="Also have an ML-KEM-768 + X25519 key: what is sent here is then sealed "
            "with suite 2, which a quantum computer of later years cannot open. Its encoding "
            "follows a draft, so it is off; it costs 1 KiB per message."
        ),
    ] = False
    threads: Annotated[
        int, Meta(ge=0, le=1024, description="CPU threads for training; 0 means all.")
    ] = 0


class FamilySection(Struct, frozen=True, forbid_unknown_fields=True):
    """One family of small models."""

    name: Annotated[Name, Meta(description="Its name, as devices list it.")]
    path: Annotated[
        str, Meta(min_length=1, max_length=4096, description="Its Hugging Face folder.")
    ]
    accuracy_level: Annotated[
        Literal[1, 4],
        Meta(
            description="4 multiplies in 8 bits on devices (fast), 1 in 32 bits (exact); an "
            "encoder's bundle chooses layer by layer."
        ),
    ] = 4
    targets: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=128)], ...],
        Meta(
            max_length=64,
            description="Last names of the modules adapted in this family; empty: those of "
            "[adapter], or every linear layer of an encoder.",
        ),
    ] = ()


class TextsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """A .jsonl or .jsonl.xz file of texts the operator may use here."""

    path: Annotated[PathText, Meta(description="The file; empty means none.")] = ""
    text_column: Annotated[str, Meta(min_length=1, max_length=128, description="Its text.")] = (
        "text"
    )
    label_column: Annotated[str, Meta(min_length=1, max_length=128, description="Its label.")] = (
        "label"
    )
    most: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Rows to read from the start of the file.")
    ] = 512


class CoordinatorConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of a coordinator; `load` reads them from TOML."""

    service: ServiceSection
    families: Annotated[tuple[FamilySection, ...], Meta(min_length=1, max_length=64)]
    task: TextTask
    program: ProgramSection = ProgramSection()
    adapter: AdapterSection = AdapterSection()
    defence: DefenceSection = DefenceSection()
    llm: LlmSection = LlmSection()
    fedmkt: FedMktSection = FedMktSection()
    public: TextsSection = TextsSection()
    evaluation: TextsSection = TextsSection()
    rollout: Plan = Plan()

    @classmethod
    def load(
        cls, path: str | Path, overrides: Mapping[str, object] = NOTHING
    ) -> "CoordinatorConfig":
        """Return the settings in file `path`; relative paths in it start at its folder.

        Raises:
            ConfigError: unreadable, any of `parse_toml`'s complaints, or settings at odds.
        """
        path = Path(path)
        config = parse_toml(read_config(path), cls, str(path), overrides=overrides)
        config._check(str(path))
        return config.resolved(path.resolve().parent)

    def _check(self, source: str) -> None:
        if len(self.task.labels) != len(self.task.words):
            raise ConfigError(
                f"{source}: task.words has {len(self.task.words)} entries for "
                f"{len(self.task.labels)} task.labels; give one word per label"
            )
        if 0 < self.adapter.down_ratio < 2:
            raise ConfigError(
                f"{source}: adapter.down_ratio = {self.adapter.down_ratio} is below 2, which whole "
                "float16 adapters reach; use 0 for those, or 2 and more"
            )
        if self.program.need > self.program.cohort:
            raise ConfigError(
                f"{source}: program.need = {self.program.need} is above program.cohort = "
                f"{self.program.cohort}; no round could complete"
            )
        if self.program.name in {"crosslm", "fedmkt"} and not self.llm.path:
            raise ConfigError(f"{source}: program.name = {self.program.name!r} needs llm.path")
        if self.llm.verify and not self.llm.path:
            raise ConfigError(f"{source}: llm.verify needs llm.path")
        if self.program.name == "fedmkt" and not self.public.path:
            raise ConfigError(f"{source}: program.name = 'fedmkt' needs public.path, with labels")
        if len({family.name for family in self.families}) != len(self.families):
            raise ConfigError(f"{source}: two families have the same name")

    def check_paths(self) -> None:
        """Check that every model folder and text file is there.

        Raises:
            ConfigError: one is not; names the key.
        """
        folders = {f"families.{family.name}.path": family.path for family in self.families}
        folders["llm.path"] = self.llm.path
        for key, path in folders.items():
            if path and not (Path(path) / "config.json").is_file():
                raise ConfigError(f"{key} = {path!r} is no Hugging Face folder: no config.json")
        for key, section in (("public.path", self.public), ("evaluation.path", self.evaluation)):
            if section.path and not Path(section.path).is_file():
                raise ConfigError(f"{key} = {section.path!r} is not a file")

    def resolved(self, folder: Path) -> "CoordinatorConfig":
        """Return the same settings with every path made absolute, starting at `folder`."""

        absolute = partial(absolute_path, folder)
        replace = msgspec.structs.replace
        return replace(
            self,
            service=replace(
                self.service,
                state_dir=absolute(self.service.state_dir),
                password_file=absolute(self.service.password_file),
                ca_file=absolute(self.service.ca_file),
                cert_file=absolute(self.service.cert_file),
                key_file=absolute(self.service.key_file),
                broker_dir=absolute(self.service.broker_dir),
            ),
            families=tuple(replace(f, path=absolute(f.path)) for f in self.families),
            llm=replace(self.llm, path=absolute(self.llm.path)),
            public=replace(self.public, path=absolute(self.public.path)),
            evaluation=replace(self.evaluation, path=absolute(self.evaluation.path)),
        )
