"""Builds the configured program: LLM, twin, exchange and the functions that package releases.

Knows which parts each algorithm needs and where their files are. Does not know how a program is
run. Importing it loads torch.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from coordinator.algorithms.crosslm import CrossLMConfig, crosslm
from coordinator.algorithms.fedavg import FedAvgConfig, fedavg
from coordinator.config import CoordinatorConfig, FamilySection, TextsSection
from coordinator.distill import merge
from coordinator.events import Events
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.families import Family, Package
from coordinator.gate import Gate
from coordinator.llm import Llm, Update
from coordinator.programs import Commit, Program, ProgramFactory
from coordinator.robust import Rule
from coordinator.texts import read_texts
from coordinator.twin import Twin
from edge_sdk.errors import ConfigError
from edge_sdk.train.local import quickest_dtype
from edge_sdk.train.lora import Factors, LoraSpec
from exporters.bundle import read_manifest, write_adapter_release
from exporters.slm import SlmOptions, export_slm


def program_of(
    config: CoordinatorConfig,
    folder: Path,
    base: str,
    cohort: tuple[str, ...],
    events: Events,
) -> ProgramFactory:
    """Return the factory of the configured program over `cohort`, whose bundle is `base`.

    Raises:
        ConfigError: settings that do not fit the models, or two families (not supported yet).
        DataError: a text file that cannot be used.
    """
    if len(config.families) != 1:
        raise ConfigError(
            f"{len(config.families)} families are configured; {config.program.name} takes one"
        )
    family, spec = config.families[0], _spec(config)
    bundle = folder / "bundles" / family.name / base
    package = _adapter_packager(folder, family, bundle, spec)
    seed = config.program.seed

    def twin_and_exchange() -> tuple[Twin, AdapterExchange]:
        twin = Twin.from_bundle(
            family.name, bundle, config.task, spec, seed=seed, dtype=quickest_dtype()
        )
        return twin, AdapterExchange(family.name, twin.layout, spec, seed=seed, rule=_rule(config))

    judged = _texts(config.evaluation, labelled=True)
    if config.program.name == "fedavg":

        def build_fedavg(resume: Commit | None) -> Program:
            _take_threads(config)
            twin, exchange = twin_and_exchange()
            return fedavg(
                exchange,
                cohort,
                _fedavg_config(config),
                base=base,
                package=package,
                gate=_gate(config, twin, judged, events),
                resume=resume,
            )

        return build_fedavg

    public = [text for text, _ in _texts(config.public, labelled=False)]

    def build_crosslm(resume: Commit | None) -> Program:
        _take_threads(config)
        twin, exchange = twin_and_exchange()
        llm = Llm(
            Path(config.llm.path),
            config.task,
            LoraSpec(config.llm.rank, config.llm.alpha, config.llm.targets),
            seed=seed,
            generic=public[:64],
            dtype=quickest_dtype(),
        )
        measure = _measure(llm, judged, events)
        if measure is not None and resume is None:
            events("llm", stage="before", **measure())
        whole = _model_packager(config, folder, family, spec)
        gate = _gate(config, twin, judged, events)
        return crosslm(
            llm,
            [Family(twin, exchange, cohort, base, package, whole, gate)],
            crosslm_config(config),
            public_texts=public,
            measure=measure,
            stage=events.stage,
            seed=seed,
            resume=resume,
        )

    return build_crosslm


def _take_threads(config: CoordinatorConfig) -> None:
    # OpenMP counts threads per calling thread, so this is for the one that runs the program.
    if config.service.threads:
        torch.set_num_threads(config.service.threads)


def _spec(config: CoordinatorConfig) -> LoraSpec:
    return LoraSpec(config.adapter.rank, config.adapter.alpha, config.adapter.targets)


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


def _gate(
    config: CoordinatorConfig, twin: Twin, judged: list[tuple[str, str]], events: Events
) -> Gate:
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
        with TemporaryDirectory(dir=folder, prefix=".merge-") as scratch:
            merged = merge(Path(family.path), factors, spec, Path(scratch) / "model")
            export_slm(
                merged,
                out,
                family=family.name,
                release=release,
                task=config.task,
                options=SlmOptions(accuracy_level=family.accuracy_level),
                lineage={"program": config.program.name, "rounds": str(config.program.rounds)},
            )
        return out

    return package


def _texts(section: TextsSection, *, labelled: bool) -> list[tuple[str, str]]:
    if not section.path:
        return []
    return read_texts(
        Path(section.path),
        text_column=section.text_column,
        label_column=section.label_column if labelled else None,
        most=section.most,
    )


def _measure(
    llm: Llm, judged: list[tuple[str, str]], events: Events
) -> Callable[[], dict[str, float]] | None:
    if not judged:
        return None
    texts, labels = [text for text, _ in judged], [label for _, label in judged]

    def measure() -> dict[str, float]:
        with events.stage("llm_score"):
            return {"llm_accuracy": round(llm.accuracy(texts, labels), 4)}

    return measure
