"""The kinds of small model a family may hold, as the coordinator treats them.

Knows which programs a kind can take part in, how it becomes a bundle and which of its layers are
adapted. Does not know programs, twins or devices; how a bundle is opened for training is
`edge_sdk.train.kinds`. Importing it loads no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coordinator.config import CoordinatorConfig, FamilySection
from edge_sdk.errors import ConfigError
from edge_sdk.wire.manifest import ReleaseManifest
from edge_sdk.wire.messages import TextTask
from exporters.classifier import add_classifier, has_classifier, is_encoder, labels_of


class _Export(Protocol):
    def __call__(
        self,
        model_dir: Path,
        out: Path,
        *,
        section: FamilySection,
        release: str,
        task: TextTask,
        lineage: Mapping[str, str],
    ) -> ReleaseManifest: ...


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of small model.

    Attributes:
        name: as manifests have it.
        programs: the programs it can take part in.
        lacks: why not in the others.
        export: makes a bundle of a Hugging Face folder.
        every_layer: whether all its linear layers are adapted unless its family names some.
    """

    name: str
    programs: frozenset[str]
    lacks: str
    export: _Export
    every_layer: bool


def _export_decoder(
    model_dir: Path,
    out: Path,
    *,
    section: FamilySection,
    release: str,
    task: TextTask,
    lineage: Mapping[str, str],
) -> ReleaseManifest:
    from exporters.slm import SlmOptions, export_slm

    return export_slm(
        model_dir,
        out,
        family=section.name,
        release=release,
        task=task,
        options=SlmOptions(accuracy_level=section.accuracy_level),
        lineage=lineage,
    )


def _export_encoder(
    model_dir: Path,
    out: Path,
    *,
    section: FamilySection,
    release: str,
    task: TextTask,
    lineage: Mapping[str, str],
) -> ReleaseManifest:
    from exporters.encoder import export_encoder

    return export_encoder(
        model_dir, out, family=section.name, release=release, task=task, lineage=lineage
    )


DECODER = Kind(
    "decoder", frozenset({"fedavg", "crosslm", "fedmkt"}), "", _export_decoder, every_layer=False
)
ENCODER = Kind(
    "encoder",
    frozenset({"fedavg", "crosslm"}),
    "it labels texts and says nothing of next tokens",
    _export_encoder,
    every_layer=True,
)


def kind_of(model_dir: Path | str) -> Kind:
    """Return the kind of the model in a Hugging Face folder, by its config.json."""
    return ENCODER if is_encoder(Path(model_dir)) else DECODER


def check_kinds(config: CoordinatorConfig) -> None:
    """Check that every model is of a kind that the program can use.

    Raises:
        ConfigError: a family cannot take part, its classifier lacks a label of the task, or the
            LLM cannot write; says what to do.
    """
    for section in config.families:
        kind, program = kind_of(section.path), config.program.name
        if program not in kind.programs:
            able = " or ".join(repr(name) for name in sorted(kind.programs))
            raise ConfigError(
                f"family {section.name!r} is an {kind.name}, which cannot take part in {program}: "
                f"{kind.lacks}; set program.name to {able}, or leave the family out"
            )
        if kind is ENCODER and has_classifier(Path(section.path)):
            _check_labels(section, config.task)
    if config.llm.path and kind_of(config.llm.path) is ENCODER:
        raise ConfigError(
            f"llm.path = {config.llm.path!r} holds an encoder, which cannot write; name a decoder"
        )


def _check_labels(section: FamilySection, task: TextTask) -> None:
    names = labels_of(Path(section.path))
    lacking = sorted(set(task.labels) - names)
    if lacking and names != {f"LABEL_{i}" for i in range(len(task.labels))}:
        raise ConfigError(
            f"family {section.name!r} has no label {lacking[0]!r} of task {task.name}, it has "
            f"{', '.join(sorted(names))}; name an encoder trained for the task's labels, or one "
            "without a classifier, which is given one"
        )


def model_folder(folder: Path, section: FamilySection, task: TextTask, *, seed: int) -> Path:
    """Return the Hugging Face folder that the family's bundles are made from.

    An encoder without a classifier is given one for the task's labels, once, below `folder`.

    Raises:
        ExportError: it cannot be given one.
    """
    path = Path(section.path)
    if not is_encoder(path) or has_classifier(path):
        return path
    made = folder / "models" / section.name
    if made.exists():
        return made
    return add_classifier(path, made, labels=task.labels, seed=seed)


def targets_of(
    config: CoordinatorConfig, section: FamilySection, base: ReleaseManifest
) -> tuple[str, ...]:
    """Return the last names of the layers that the family's adapters change.

    Raises:
        ConfigError: the family's base has none of them; lists what it has.
    """
    has = sorted({slot.rpartition(".")[2] for slot in base.adapter_slots})
    whole = kind_of(section.path).every_layer
    chosen = section.targets or (tuple(has) if whole else config.adapter.targets)
    if not set(chosen) & set(has):
        raise ConfigError(
            f"family {section.name!r} has none of the layers {', '.join(chosen)}; set its targets "
            f"to some of {', '.join(has) or 'none (it cannot be adapted)'}"
        )
    return tuple(chosen)
