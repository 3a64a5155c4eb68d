"""Builds the configured program: LLM, twin, exchange and the functions that package releases.

Knows which parts each algorithm needs and where their files are. Does not know how a program is
run. Importing it loads torch.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from coordinator.abilities import About, nothing_known
from coordinator.algorithms.crosslm import CrossLMConfig, crosslm
from coordinator.algorithms.fedavg import FedAvgConfig, fedavg
from coordinator.algorithms.fedmkt import FedMktConfig, fedmkt
from coordinator.config import CoordinatorConfig, FamilySection, TextsSection
from coordinator.distill import merge
from coordinator.events import Events
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.families import Family, Package
from coordinator.gate import Gate
from coordinator.kinds import kind_of, model_folder, targets_of
from coordinator.llm import Llm, Update
from coordinator.programs import Commit, Program, ProgramFactory
from coordinator.robust import Rule
from coordinator.texts import read_texts
from coordinator.twin import Twin
from edge_sdk.train.local import quickest_dtype
from edge_sdk.train.lora import Factors, LoraSpec
from edge_sdk.train.teaching import Lesson
from edge_sdk.wire.manifest import ReleaseManifest
from exporters.bundle import read_manifest, write_adapter_release


def program_of(
    config: CoordinatorConfig,
    folder: Path,
    base: str,
    crews: Mapping[str, tuple[str, ...]],
    events: Events,
    about: About = nothing_known,
) -> ProgramFactory:
    """Return the factory of the configured program over `crews`, the devices of each family, whose
    bundle is `base`; `about` says what devices read and lack.

    Raises:
        ConfigError: settings that do not fit the models.
        DataError: a text file that cannot be used.
    """
    name = config.program.name
    judged = _texts(config.evaluation, labelled=True)
    public = [] if name == "fedavg" else _texts(config.public, labelled=name == "fedmkt")
    build = {"fedavg": _fedavg, "crosslm": _crosslm, "fedmkt": _fedmkt}[name]

    def factory(resume: Commit | None) -> Program:
        _take_threads(config)
        families = [
            _family(config, folder, base, section, crews[section.name], judged, events, about)
            for section in config.families
        ]
        return build(config, folder, families, public, judged, events, resume)

    return factory


Rows = list[tuple[str, str]]
"""Texts with their labels, "" where they have none."""


def _family(
    config: CoordinatorConfig,
    folder: Path,
    base: str,
    section: FamilySection,
    crew: tuple[str, ...],
    judged: Rows,
    events: Events,
    about: About,
) -> Family:
    bundle = folder / "bundles" / section.name / base
    spec = _spec(config, section, read_manifest(bundle))
    seed, dtype = config.program.seed, quickest_dtype()
    twin = Twin.from_bundle(section.name, bundle, config.task, spec, seed=seed, dtype=dtype)
    return Family(
        twin,
        AdapterExchange(
            section.name,
            twin.layout,
            spec,
            seed=seed,
            rule=_rule(config),
            down_ratio=config.adapter.down_ratio,
            about=about,
        ),
        crew,
        base,
        _adapter_packager(folder, section, bundle, spec),
        _model_packager(config, folder, section, spec),
        _gate(config, twin, judged, events),
    )


def _fedavg(
    config: CoordinatorConfig,
    folder: Path,
    families: list[Family],
    public: Rows,
    judged: Rows,
    events: Events,
    resume: Commit | None,
) -> Program:
    return fedavg(families, _fedavg_config(config), resume=resume)


def _crosslm(
    config: CoordinatorConfig,
    folder: Path,
    families: list[Family],
    public: Rows,
    judged: Rows,
    events: Events,
    resume: Commit | None,
) -> Program:
    texts = [text for text, _ in public]
    llm = _llm(config, texts)
    return crosslm(
        llm,
        families,
        crosslm_config(config),
        public_texts=texts,
        measure=_told_at_first(llm, judged, events, resume),
        stage=events.stage,
        seed=config.program.seed,
        resume=resume,
    )


def _fedmkt(
    config: CoordinatorConfig,
    folder: Path,
    families: list[Family],
    public: Rows,
    judged: Rows,
    events: Events,
    resume: Commit | None,
) -> Program:
    every = config.fedmkt.held_out
    llm = _llm(config, [text for text, _ in public])
    rows = judged[: config.defence.judged]
    texts, labels = [text for text, _ in rows], [label for _, label in rows]

    def judge(factors: Factors) -> tuple[float, int]:
        with events.stage("judge"):
            return llm.accuracy(texts, labels), len(texts)  # these are the factors it has

    return fedmkt(
        llm,
        families,
        fedmkt_config(config),
        public=[row for i, row in enumerate(public) if not every or i % every],
        held_out=[row for i, row in enumerate(public) if every and not i % every],
        cache=folder / "vocabularies",
        llm_gate=Gate(config.defence.max_drop, judge if rows else None),
        measure=_told_at_first(llm, judged, events, resume),
        stage=events.stage,
        seed=config.program.seed,
        resume=resume,
    )


def _llm(config: CoordinatorConfig, generic: list[str]) -> Llm:
    return Llm(
        Path(config.llm.path),
        config.task,
        LoraSpec(config.llm.rank, config.llm.alpha, config.llm.targets),
        seed=config.program.seed,
        generic=generic[:64],
        dtype=quickest_dtype(),
    )


def _told_at_first(
    llm: Llm, judged: Rows, events: Events, resume: Commit | None
) -> Callable[[], dict[str, float]] | None:
    """How the LLM is measured; its figures before the first round become an event."""
    measure = _measure(llm, judged, events)
    if measure is not None and resume is None:
        events("llm", stage="before", **measure())
    return measure


def _take_threads(config: CoordinatorConfig) -> None:
    # OpenMP counts threads per calling thread, so this is for the one that runs the program.
    if config.service.threads:
        torch.set_num_threads(config.service.threads)


def _spec(config: CoordinatorConfig, section: FamilySection, base: ReleaseManifest) -> LoraSpec:
    targets = targets_of(config, section, base)
    return LoraSpec(config.adapter.rank, config.adapter.alpha, targets)


def _training(config: CoordinatorConfig) -> LocalTraining:
    adapter = config.adapter
    return LocalTraining(
        steps=adapter.steps,
        batch=adapter.batch,
        lr=adapter.lr,
        synthetic_weight=adapter.synthetic_weight,
        ratio=adapter.ratio,
    )


def _rule(config: CoordinatorConfig) -> Rule:
    found = config.defence
    return Rule(found.aggregation, found.clip, found.refuse, found.max_norm, found.examples)


def _gate(config: CoordinatorConfig, twin: Twin, judged: Rows, events: Events) -> Gate:
    """The gate of one program; it judges by the twin where there are labelled texts."""
    rows = judged[: config.defence.judged]
    texts, labels = [text for text, _ in rows], [label for _, label in rows]

    def judge(factors: Factors) -> tuple[float, int]:
        with events.stage("judge"):
            return twin.accuracy(texts, labels, factors), len(texts)

    return Gate(config.defence.max_drop, judge if rows else None)


def _fedavg_config(config: CoordinatorConfig) -> FedAvgConfig:
    program = config.program
    return FedAvgConfig(
        rounds=program.rounds,
        need=program.need,
        within_s=program.within_s,
        retries=program.retries,
        learn_codec=program.learn_codec,
        training=_training(config),
    )


def crosslm_config(config: CoordinatorConfig) -> CrossLMConfig:
    """Return the algorithm's settings as the file gives them."""
    program, llm = config.program, config.llm
    return CrossLMConfig(
        rounds=program.rounds,
        need=program.need,
        within_s=program.within_s,
        retries=program.retries,
        samples=program.samples,
        tau=program.tau,
        temperature=program.temperature,
        more_temperatures=program.more_temperatures,
        frozen_writer=program.frozen_writer,
        top_p=program.top_p,
        max_new_tokens=program.max_new_tokens,
        pool=program.pool,
        llm_share=program.llm_share,
        distil_steps=program.distil_steps,
        distil_lr=program.distil_lr,
        patience=program.patience,
        score_on_devices=program.score_on_devices,
        learn_codec=program.learn_codec,
        training=_training(config),
        update=Update(
            beta=llm.beta,
            reg=llm.reg,
            tau=program.tau,
            lr=llm.lr,
            batch=llm.batch,
            steps=llm.steps,
        ),
    )


def fedmkt_config(config: CoordinatorConfig) -> FedMktConfig:
    """Return the algorithm's settings as the file gives them."""
    program, found, llm = config.program, config.fedmkt, config.llm
    return FedMktConfig(
        rounds=program.rounds,
        need=program.need,
        within_s=program.within_s,
        retries=program.retries,
        kept=found.kept,
        whole=found.whole,
        llm=Lesson(found.share, llm.steps, llm.batch, llm.lr),
        slm=Lesson(found.share, found.steps, found.batch, found.lr),
        teach_llm=found.direction != "to-slms",
        teach_slms=found.direction != "to-llm",
        ask_devices=found.ask_devices,
        teach_on_devices=found.teach_on_devices,
        greedy=found.align == "greedy",
        stale_rounds=found.stale_rounds,
        max_rise=found.max_rise,
        patience=found.patience,
        learn_codec=program.learn_codec,
        training=_training(config),
    )


def _adapter_packager(folder: Path, family: FamilySection, bundle: Path, spec: LoraSpec) -> Package:
    def package(release: str, factors: Factors) -> Path:
        out = folder / "bundles" / family.name / release
        shutil.rmtree(out, ignore_errors=True)  # left by a run that was killed before it published
        write_adapter_release(
            out,
            read_manifest(bundle),
            factors,
            release=release,
            rank=spec.rank,
            alpha=spec.alpha,
        )
        return out

    return package


def _model_packager(
    config: CoordinatorConfig, folder: Path, family: FamilySection, spec: LoraSpec
) -> Package:
    def package(release: str, factors: Factors) -> Path:
        out = folder / "bundles" / family.name / release
        shutil.rmtree(out, ignore_errors=True)
        base = model_folder(folder, family, config.task, seed=config.program.seed)
        with TemporaryDirectory(dir=folder, prefix=".merge-") as scratch:
            merged = merge(base, factors, spec, Path(scratch) / "model")
            kind_of(merged).export(
                merged,
                out,
                section=family,
                release=release,
                task=config.task,
                lineage={"program": config.program.name, "rounds": str(config.program.rounds)},
            )
        return out

    return package


def _texts(section: TextsSection, *, labelled: bool) -> Rows:
    if not section.path:
        return []
    return read_texts(
        Path(section.path),
        text_column=section.text_column,
        label_column=section.label_column if labelled else None,
        most=section.most,
    )


def _measure(llm: Llm, judged: Rows, events: Events) -> Callable[[], dict[str, float]] | None:
    if not judged:
        return None
    texts, labels = [text for text, _ in judged], [label for _, label in judged]

    def measure() -> dict[str, float]:
        with events.stage("llm_score"):
            return {"llm_accuracy": round(llm.accuracy(texts, labels), 4)}

    return measure
