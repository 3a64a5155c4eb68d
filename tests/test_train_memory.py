"""The memory ceiling: what is predicted is kept, and the quickest way that fits is taken."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from compression.int4_torch import load_slm
from edge_sdk.errors import RuntimeFailure
from edge_sdk.train import kinds
from edge_sdk.train.lora import Adapter, LoraSpec, start_factors
from edge_sdk.train.memory import Way, compute_again, needs_of, peak_mb, quickest
from edge_sdk.train.text_task import TaskReader
from edge_sdk.train.trainer import train_adapter
from examples.training_lab import write_bundle
from tests.learning_world import TASK, examples, model, tokenizer
from tests.training_process import bundle, train

SPEC = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
TOKENS = 64
MIB = 2**20


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 8 M weights, so that its layers outweigh the constants."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=10,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return write_bundle(tmp_path_factory.mktemp("wide"), config)


@pytest.fixture(scope="module")
def needs(wide: Path):
    return needs_of(wide, SPEC, tokens=TOKENS)


def kept_by(adapter: Adapter, rows: int) -> int:
    """Bytes that a real forward pass under the head keeps."""
    owned = {p.untyped_storage().data_ptr() for p in adapter.model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    ids = torch.zeros(rows, TOKENS, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        adapter.model.base_model(input_ids=ids, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_predicted_is_kept(wide: Path, needs, packed: bool) -> None:
    adapter = Adapter(load_slm(wide, packed=packed), SPEC)
    adapter.load(start_factors(adapter.layout, 0))

    assert kept_by(adapter, 1) == pytest.approx(needs.kept, rel=0.05)
    assert kept_by(adapter, 4) == pytest.approx(4 * needs.kept, rel=0.05)


def test_computing_again_keeps_little_and_changes_no_bit(wide: Path, needs) -> None:
    def gradients(again: bool):
        adapter = Adapter(load_slm(wide, packed=True), SPEC)
        adapter.load(start_factors(adapter.layout, 0))
        if again:
            compute_again(adapter.model)
        ids = torch.arange(TOKENS)[None]
        adapter.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return adapter, [p.grad for p in adapter.parameters()]

    plain, wanted = gradients(False)
    lean, found = gradients(True)

    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert max(float(g.abs().max()) for g in wanted) > 0
    assert kept_by(lean, 4) < kept_by(plain, 4) / 5


def test_the_quickest_way_that_fits_is_taken(needs) -> None:
    heavy = replace(needs, dense=300 * MIB, packed=100 * MIB)  # as of a 150 M model
    least = peak_mb(heavy, Way(packed=True, rows=1, again=True), rows=32, answers=1)

    chosen = [quickest(heavy, memory_mb=most, rows=32, answers=1) for most in range(least, 999, 9)]

    peaks = [way.peak_mb for way in chosen]
    assert peaks == sorted(peaks)
    assert chosen[-1] == Way(peak_mb=peak_mb(heavy, Way(), rows=32, answers=1))
    assert chosen[0] == Way(packed=True, rows=1, again=True, peak_mb=least)
    kinds = [(way.packed, way.again, way.rows) for way in chosen]
    assert (False, False, 16) in kinds  # parts of a step cost least
    assert any(packed and not again for packed, again, _ in kinds)
    small = [quickest(needs, memory_mb=most, rows=32, answers=1) for most in range(130, 500, 9)]
    assert not any(way.packed for way in small)  # 8 M weights: the scratch is larger than the gain


def test_what_cannot_fit_is_refused_with_the_figures(needs) -> None:
    least = min(
        peak_mb(needs, Way(packed, 1, again), rows=8, answers=1)
        for packed in (False, True) for again in (False, True)
    )  # fmt: skip

    with pytest.raises(RuntimeFailure, match=rf"needs {least} MiB.*allows {least - 1}"):
        quickest(needs, memory_mb=least - 1, rows=8, answers=1)
    assert quickest(needs, memory_mb=least, rows=8, answers=1).peak_mb == least


def test_parts_of_a_step_add_up_to_it() -> None:
    rows = examples(30, seed=1)
    made = [(text, label, 0.25 + 0.5 * (i % 2)) for i, (text, label) in enumerate(rows[:9])]

    def factors(at_once: int):
        adapter, reader = Adapter(model(), SPEC), TaskReader(TASK, tokenizer(), max_tokens=32)
        adapter.load(start_factors(adapter.layout, 0))
        result = train_adapter(
            adapter, reader, rows, steps=3, batch=8, lr=1e-3, seed=1, synthetic=made,
            synthetic_weight=0.5, rows=at_once,
        )  # fmt: skip
        return result.factors, result.loss

    whole, loss = factors(0)
    for at_once in (1, 5, 8):
        parts, same_loss = factors(at_once)
        assert same_loss == pytest.approx(loss, rel=1e-5)
        for key, value in whole.items():
            np.testing.assert_allclose(parts[key], value, atol=2e-5)
    same, _ = factors(12)  # all twelve at once
    assert all(np.array_equal(same[key], whole[key]) for key in whole)


def test_a_device_trains_under_its_ceiling_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle(tmp_path / "bundle")
    taken = []
    monkeypatch.setattr(
        kinds, "load_slm", lambda *a, **k: taken.append(k["packed"]) or load_slm(*a, **k)
    )
    free = train(tmp_path)

    with pytest.raises(RuntimeFailure, match=r"train\.memory_mb allows 1"):
        train(tmp_path, memory_mb=1)
    under = train(tmp_path, memory_mb=1000)

    assert taken == [False, False]  # a model this small is no smaller packed
    assert under.keys() == free.keys()
    change = np.concatenate([(under[k] - free[k]).ravel() for k in free])
    assert np.linalg.norm(change) < 0.5 * np.linalg.norm(
        np.concatenate([v.ravel() for v in free.values()])
    )
