"""Training an adapter: it learns, it repeats itself exactly, synthetic texts count by weight."""

import numpy as np
import pytest
import torch
from learning_world import SIGNS, TASK, examples, model, tokenizer

from edge_sdk.errors import DataError, FleetError
from edge_sdk.train.lora import Adapter, LoraSpec, start_factors
from edge_sdk.train.text_task import TaskReader, accuracy, label_probs
from edge_sdk.train.trainer import shuffled_batches, train_adapter

SPEC = LoraSpec(rank=8, alpha=16.0, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
HELD_OUT = examples(60, seed=99)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def trained(rows, **how):
    adapter, reader = Adapter(model(), SPEC), TaskReader(TASK, tokenizer(), max_tokens=32)
    adapter.load(start_factors(adapter.layout, 0))
    how = {"steps": 60, "batch": 16, "lr": 2e-2, "seed": 1} | how
    result = train_adapter(adapter, reader, rows, **how)
    texts, labels = zip(*HELD_OUT, strict=True)
    return result, accuracy(adapter.model, reader, texts, labels)


def test_it_learns_the_rule():
    seen = []

    result, score = trained(
        examples(120, seed=1), progress=lambda done, of, loss: seen.append((done, of))
    )

    assert score > 0.9
    assert result.examples == 120
    assert result.loss < 1.0
    assert seen == [(i, 60) for i in range(1, 61)]


def test_the_same_call_gives_the_same_factors():
    rows = examples(40, seed=1)

    first, _ = trained(rows, steps=5)
    second, _ = trained(rows, steps=5)
    other, _ = trained(rows, steps=5, seed=2)

    assert all(np.array_equal(first.factors[key], second.factors[key]) for key in first.factors)
    assert any(not np.array_equal(first.factors[k], other.factors[k]) for k in first.factors)


def test_synthetic_texts_teach_a_label_the_device_never_saw():
    own = [row for row in examples(120, seed=1) if row[1] != "list"]
    made = [(f"{SIGNS['list'][i % 2]} {text}", "list", 1.0)
            for i, (text, _) in enumerate(own[:40])]  # fmt: skip

    _, without = trained(own)
    _, unused = trained(own, synthetic=made, synthetic_weight=0.0)
    _, with_them = trained(own, synthetic=made, synthetic_weight=0.5)

    assert unused == without
    assert with_them > without + 0.1


def test_nothing_to_train_on_and_divergence_are_named():
    with pytest.raises(DataError, match="at least one example"):
        trained([])
    with pytest.raises(DataError, match="poem"):
        trained([("a", "poem")])
    adapter, reader = Adapter(model(), SPEC), TaskReader(TASK, tokenizer(), max_tokens=32)
    adapter.load({k: np.full(s, np.float32(1e30)) for k, s in adapter.layout.items()})
    with pytest.raises(FleetError, match="diverged"):
        train_adapter(adapter, reader, [("a", "sum")], steps=2, batch=1, lr=1e-3, seed=0)


def test_batches_visit_every_row_once_an_epoch():
    drawn = shuffled_batches(10, 5, seed=0)
    epoch = next(drawn) + next(drawn)
    assert sorted(epoch) == list(range(10))
    assert len(next(shuffled_batches(3, 8, seed=0))) == 3
    assert list(shuffled_batches(0, 4, seed=0)) == []


def test_balance_takes_the_label_shares_out_of_the_answer():
    """Texts that say nothing, mostly of one label: the shares are learned, or left out."""
    rows = [("the cat", "sum")] * 70 + [("the cat", "story")] * 10

    def says_sum(balance):
        adapter, reader = Adapter(model(), SPEC), TaskReader(TASK, tokenizer(), max_tokens=32)
        adapter.load(start_factors(adapter.layout, 0))
        train_adapter(adapter, reader, rows, steps=60, batch=16, lr=1e-2, seed=1, balance=balance)
        return float(label_probs(adapter.model, reader, ["the cat"])[0, 0])

    assert says_sum(0.0) > 0.9
    assert says_sum(1.0) < says_sum(0.0) - 0.1
