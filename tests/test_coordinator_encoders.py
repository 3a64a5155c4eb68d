"""An encoder family on the coordinator: its twin, its releases, a classifier where it has none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.config import FamilySection
from coordinator.distill import distil, merge
from coordinator.kinds import kind_of, model_folder
from coordinator.twin import Twin
from edge_sdk.encoders import EncoderSession
from edge_sdk.errors import ConfigError
from edge_sdk.train.lora import LoraSpec, add
from exporters.bundle import read_manifest
from exporters.classifier import add_classifier, has_classifier
from exporters.publisher import Publisher
from tests.encoders_tiny import LABELS, TASK, TEXTS, exported, save_modernbert, source

SPEC = LoraSpec(rank=4, alpha=8.0, targets=("Wqkv", "Wi", "Wo", "classifier"))
WORDS = {"open": "what is the river", "list": "give me ideas", "name": "sort these animals"}
MADE = [(f"{WORDS[LABELS[i % 3]]} {i % 7}", LABELS[i % 3]) for i in range(36)]
FAMILY = FamilySection(name="tiny", path="unused")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def twin() -> Twin:
    return Twin.from_bundle("tiny", exported("modernbert"), TASK, SPEC, seed=1, dtype=torch.float32)


def test_a_twin_scores_as_its_devices_do_and_takes_their_updates(twin: Twin) -> None:
    before = twin.probs(TEXTS)
    with EncoderSession(exported("modernbert")) as session:
        np.testing.assert_allclose(before, session.label_probabilities(TEXTS), atol=0.03)
    rng = np.random.default_rng(0)
    change = {k: rng.normal(0, 0.05, s).astype(np.float32) for k, s in twin.layout.items()}

    twin.restore(add(twin.factors, change), {"a": twin.factors, "b": add(twin.factors, change)})

    assert np.abs(twin.probs(TEXTS) - before).max() > 1e-3
    assert twin.votes(TEXTS).shape == (2, len(TEXTS), len(LABELS))
    np.testing.assert_allclose(twin.votes(TEXTS)[0], before, atol=1e-5)
    np.testing.assert_allclose(twin.calibrate(TEXTS).sum(axis=1), 1.0, atol=1e-5)


def test_a_twin_taught_by_synthetic_texts_becomes_a_release_that_runs(
    twin: Twin, tmp_path: Path
) -> None:
    texts, labels = [text for text, _ in MADE], [label for _, label in MADE]
    soft = np.full((len(MADE), len(LABELS)), 0.03, np.float32)
    soft[range(len(MADE)), [LABELS.index(label) for label in labels]] = 0.94
    before = twin.accuracy(texts, labels)

    distil(twin, texts, soft, steps=60, batch=12, lr=0.01, seed=0)
    whole = merge(source("modernbert"), twin.factors, SPEC, tmp_path / "model")
    kind_of(whole).export(
        whole, tmp_path / "r2", section=FAMILY, release="r2", task=TASK, lineage={"rounds": "1"}
    )

    assert twin.accuracy(texts, labels) >= 0.9 > before
    manifest = read_manifest(tmp_path / "r2")
    assert (manifest.kind, manifest.release) == ("encoder", "r2")
    assert manifest.lineage == {"rounds": "1"}
    publisher = Publisher(tmp_path / "repository")
    publisher.init()
    publisher.publish("tiny", "r2", tmp_path / "r2")
    with EncoderSession(tmp_path / "r2") as session:
        right = [a == b for a, b in zip(session.classify_many(texts), labels, strict=True)]
        apart = np.abs(session.label_probabilities(TEXTS) - twin.probs(TEXTS))
    assert np.mean(right) >= 0.9
    assert apart.mean() < 0.05


def test_targets_that_the_encoder_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="q_proj do not fit this model"):
        Twin.from_bundle(
            "tiny", exported("modernbert"), TASK, LoraSpec(2, 4.0, ("q_proj",)), seed=1
        )


def test_an_encoder_without_a_classifier_is_given_one_once(tmp_path: Path) -> None:
    plain = save_modernbert(tmp_path / "plain", kind="ForMaskedLM")
    section = FamilySection(name="reader", path=str(plain))

    made = model_folder(tmp_path / "cloud", section, TASK, seed=3)
    again = add_classifier(plain, tmp_path / "again", labels=TASK.labels, seed=3)
    other = add_classifier(plain, tmp_path / "other", labels=TASK.labels, seed=4)

    assert not has_classifier(plain)
    assert has_classifier(made)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (made, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (made / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
    when = (made / "config.json").stat().st_mtime_ns
    assert model_folder(tmp_path / "cloud", section, TASK, seed=3) == made
    assert (made / "config.json").stat().st_mtime_ns == when
    kind_of(made).export(
        made, tmp_path / "base", section=section, release="base", task=TASK, lineage={}
    )
    with EncoderSession(tmp_path / "base") as session:
        assert session.labels == TASK.labels
