"""The twin: replicas share one base, scores are their mean, distillation and merging."""

import numpy as np
import pytest
import torch
from learning_world import TASK, examples, folder, model, tokenizer
from transformers import AutoModelForCausalLM

from coordinator.distill import distil, merge, sharpen
from coordinator.twin import Twin, verdict
from edge_sdk.errors import ExportError, LocalProtocolError
from edge_sdk.train.lora import LoraSpec
from edge_sdk.train.text_task import TaskReader

SPEC = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
TEXTS = [text for text, _ in examples(9, seed=1)]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def twin():
    reader = TaskReader(TASK, tokenizer(), max_tokens=32)
    return Twin("tiny", model(), reader, SPEC, seed=0)


def random_factors(layout, seed):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(0, 0.3, s).astype(np.float16).astype(np.float32)
            for k, s in layout.items()}  # fmt: skip


def test_a_replica_is_the_base_with_the_devices_factors(twin):
    factors = random_factors(twin.layout, 1)
    base = twin.probs(TEXTS)

    other = twin.probs(TEXTS, factors)

    assert np.abs(other - base).max() > 1e-3
    assert np.array_equal(twin.probs(TEXTS), base)  # nothing stayed behind
    twin.set_global(factors)
    assert np.array_equal(twin.probs(TEXTS), other)


def test_the_jury_is_the_mean_over_replicas_in_any_order(twin):
    twin.replicas = {"b": random_factors(twin.layout, 1), "a": random_factors(twin.layout, 2)}

    found = twin.jury(TEXTS)

    each = [twin.probs(TEXTS, f) for f in twin.replicas.values()]
    assert found == pytest.approx(np.mean(each, axis=0), abs=1e-6)
    twin.replicas = dict(reversed(twin.replicas.items()))
    assert np.array_equal(twin.jury(TEXTS), found)


def test_replicas_that_lean_apart_judge_better_when_freed_of_it():
    """Bayes' answers of two devices with opposite label shares, on texts of all labels alike."""
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 3
    seen = np.eye(3)[labels] * 1.5 + rng.normal(size=(600, 3))
    likelihood = np.exp(1.5 * seen)
    shares = np.array([[0.78, 0.2, 0.02], [0.2, 0.02, 0.78]])
    votes = likelihood[None] * shares[:, None]
    votes /= votes.sum(axis=2, keepdims=True)

    def per_label(answers):
        right = answers.argmax(axis=1) == labels
        return np.array([right[labels == label].mean() for label in range(3)])

    raw = per_label(verdict(votes, None))
    freed = per_label(verdict(votes, votes.mean(axis=1)))

    assert freed.mean() > raw.mean()
    assert freed.min() > raw.min() + 0.03


def test_calibrating_returns_the_jurys_verdict_and_new_replicas_undo_it(twin):
    twin.replicas = {"b": random_factors(twin.layout, 1), "a": random_factors(twin.layout, 2)}

    opinions = twin.calibrate(TEXTS)

    assert opinions.shape == (9, 3)
    assert opinions == pytest.approx(twin.jury(TEXTS), abs=1e-6)
    twin.restore(twin.factors, twin.replicas)
    assert twin.leanings is None


def test_distilling_moves_the_twin_to_its_teacher(twin):
    rows = examples(60, seed=1)
    texts = [text for text, _ in rows]
    targets = np.full((60, 3), 0.05, np.float32)
    targets[np.arange(60), [TASK.labels.index(label) for _, label in rows]] = 0.9
    held_texts, held_labels = zip(*examples(40, seed=5), strict=True)
    before = twin.accuracy(held_texts, held_labels)

    distil(twin, texts, targets, steps=60, batch=16, lr=2e-2, seed=0)

    assert twin.accuracy(held_texts, held_labels) > max(0.8, before)


def test_distilling_nothing_changes_nothing_and_bad_targets_are_refused(twin):
    before = twin.factors
    assert distil(twin, [], np.zeros((0, 3), np.float32), steps=5, batch=4, lr=1e-3, seed=0) == 0.0
    assert twin.factors is before
    with pytest.raises(LocalProtocolError, match="targets"):
        distil(twin, ["a"], np.zeros((1, 2), np.float32), steps=5, batch=4, lr=1e-3, seed=0)


def test_sharpen_keeps_rows_probabilities():
    probs = np.array([[0.6, 0.3, 0.1]], np.float32)
    assert sharpen(probs, 0.5)[0] == pytest.approx([0.7826, 0.1957, 0.0217], abs=1e-3)
    assert sharpen(probs, 1.0) == pytest.approx(probs)


def test_merging_writes_an_ordinary_model_that_answers_the_same(twin, tmp_path):
    home = folder(tmp_path / "base")
    twin.set_global(random_factors(twin.layout, 3))

    merge(home, twin.factors, SPEC, tmp_path / "merged")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    twin.adapter.load(twin.factors)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=ids).logits,
            twin.adapter.model(input_ids=ids).logits,
            rtol=1e-4,
            atol=1e-4,
        )
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (
        home / "tokenizer.json"
    ).read_bytes()


def test_merging_into_the_wrong_model_is_refused(twin, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="holds no"):
        merge(tmp_path / "empty", twin.factors, SPEC, tmp_path / "out")
    with pytest.raises(ExportError, match="does not fit"):
        merge(folder(tmp_path / "wide", width=48), twin.factors, SPEC, tmp_path / "out")
    with pytest.raises(ExportError, match="no weight for"):
        merge(folder(tmp_path / "flat", layers=1), twin.factors, SPEC, tmp_path / "out")
