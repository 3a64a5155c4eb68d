"""Rows that a model gives, and the loss on another model's rows, against dense definitions."""

import numpy as np
import pytest
import torch

from edge_sdk.algorithms.alignment import Targets
from edge_sdk.algorithms.logit_rows import Places, check
from edge_sdk.errors import DataError
from edge_sdk.train.lora import Adapter, LoraSpec
from edge_sdk.train.teaching import (
    Lesson,
    lesson_texts,
    logit_table,
    mixed_loss,
    places_of,
    target_losses,
    teach,
)
from edge_sdk.train.text_task import Sequences, TaskReader
from tests.learning_world import TASK, examples, model, tokenizer

SPEC = LoraSpec(4, 8.0, ("q_proj", "v_proj", "up_proj", "down_proj"))
PAIRS = examples(9, seed=3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def reader() -> TaskReader:
    return TaskReader(TASK, tokenizer(), max_tokens=64)


def dense_loss(logits, truth, ids, mass, share, taught):  # type: ignore[no-untyped-def]
    """The loss as PAPERS.md 2 writes it, one row at a time, with an explicit "any other"."""
    log_p = torch.log_softmax(logits, dim=-1)
    rows = []
    for i in range(len(logits)):
        named = [(int(t), m) for t, m in zip(ids[i], mass[i], strict=True) if m > 0]
        soft = sum(m * log_p[i, t] for t, m in named)
        others = [t for t in range(logits.shape[1]) if t not in {t for t, _ in named}]
        soft = soft + (1 - mass[i].sum()) * torch.logsumexp(log_p[i, others], dim=0)
        rows.append(-(share * log_p[i, truth[i]] + taught[i] * soft))
    return torch.stack(rows)


def test_the_sparse_loss_is_the_dense_one_and_so_is_its_gradient() -> None:
    torch.manual_seed(0)
    n, V, k = 12, 30, 5
    truth = torch.randint(V, (n,))
    ids = torch.stack([torch.randperm(V)[:k] for _ in range(n)])
    mass = torch.rand(n, k) * (torch.rand(n, k) > 0.2)
    mass = 0.8 * mass / mass.sum(dim=1, keepdim=True)
    taught = torch.rand(n)
    gradients, values = [], []
    for loss in (mixed_loss, dense_loss):
        logits = torch.randn(n, V, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        value = loss(logits, truth, ids, mass, 0.7, taught)
        value.sum().backward()
        values.append(value.detach())
        gradients.append(logits.grad)

    assert torch.allclose(values[0], values[1], atol=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_who_already_agrees_with_the_teacher_learns_nothing_more() -> None:
    """The tail is honest: at p = q there is no gradient, though the row names 3 of 20 tokens."""
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    log_p = torch.log_softmax(logits.detach(), dim=-1)
    best, ids = log_p.topk(3, dim=-1)
    mixed_loss(
        logits, torch.zeros(4, dtype=torch.int64), ids, best.exp(), 0.0, torch.ones(4)
    ).sum().backward()

    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_a_table_is_what_the_model_says_of_the_next_tokens() -> None:
    small, rows = model(seed=4), lesson_texts(reader(), PAIRS, whole=True)
    V = tokenizer().get_vocab_size()

    table = logit_table(small, rows, kept=5, vocabulary=V)

    place = 0
    for ids, start in zip(rows.ids, rows.starts, strict=True):
        with torch.inference_mode():
            log_p = torch.log_softmax(small(torch.tensor([ids])).logits[0].float(), dim=-1)
        for t in range(start, len(ids)):
            best, chosen = log_p[t - 1].topk(5)
            assert table.places.tokens[place] == ids[t]
            assert table.truth[place] == pytest.approx(float(log_p[t - 1, ids[t]]), abs=1e-4)
            assert table.ids[place].tolist() == chosen.tolist()
            assert table.logps[place] == pytest.approx(best.numpy(), abs=2e-2)
            place += 1
    assert place == len(table.truth)
    check(table, V)
    assert table.losses() == pytest.approx(target_losses(small, rows), rel=1e-4)


def test_a_label_is_one_place_and_a_whole_text_begins_after_the_frame() -> None:
    made = reader()
    short, whole = (lesson_texts(made, PAIRS, whole=w) for w in (False, True))

    words = made.tokenizer
    assert [row[start:] for row, start in zip(short.ids, short.starts, strict=True)] == [
        [words.encode(f" {label}").ids[0]] for _, label in PAIRS
    ]
    text, label = PAIRS[0]
    said = words.decode(whole.ids[0][whole.starts[0] :])
    assert said.split() == [*text.split(), "Kind:", label] or said == f" {text}\nKind: {label}"
    with pytest.raises(DataError, match="cut it before"):
        lesson_texts(made, [("the " * 80, "sum")], whole=True)


def test_a_pupil_comes_nearer_to_its_teacher_and_only_on_chosen_texts() -> None:
    """lambda 0: nothing but the teacher; without chosen texts nothing at all is learned."""
    rows = lesson_texts(reader(), PAIRS, whole=False)
    V = tokenizer().get_vocab_size()
    places = places_of(rows)
    n = len(places.tokens)
    wanted = Targets(
        places, np.full((n, 1), 7, np.int64), np.full((n, 1), 0.9, np.float32)
    )  # an answer that no label asks for
    how = Lesson(share=0.0, steps=25, batch=9, lr=2e-2)
    said = {}
    for chosen in (True, False):
        adapter = Adapter(model(seed=1), SPEC)
        teach(adapter, rows, wanted, np.full(len(rows), chosen), how, seed=0)
        table = logit_table(adapter.model, rows, kept=V, vocabulary=V)
        said[chosen] = np.exp(table.logps[table.ids == 7].astype(np.float32)).mean()
    before = logit_table(Adapter(model(seed=1), SPEC).model, rows, kept=V, vocabulary=V)

    assert said[True] > 0.5
    assert said[False] == np.exp(before.logps[before.ids == 7].astype(np.float32)).mean()


def test_a_step_in_parts_has_the_loss_of_the_whole_step() -> None:
    """Texts of unlike length, so that a mean of the parts' means would be another number."""
    rows = lesson_texts(reader(), [*PAIRS, ("the cat", "sum")], whole=True)
    V = tokenizer().get_vocab_size()
    said = logit_table(model(seed=2), rows, kept=4, vocabulary=V)
    targets = Targets(said.places, said.ids.astype(np.int64), np.exp(said.logps.astype("f4")))
    chosen = np.arange(len(rows)) % 2 == 0
    how = Lesson(share=0.5, steps=2, batch=10, lr=1e-3)

    losses = [
        teach(Adapter(model(seed=1), SPEC), rows, targets, chosen, how, seed=0, at_once=at_once)
        for at_once in (0, 1, 3)
    ]

    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)


def test_teaching_without_texts_or_steps_changes_nothing() -> None:
    adapter = Adapter(model(seed=1), SPEC)
    start = adapter.factors()
    none = Targets(Places.of([], []), np.zeros((0, 1), np.int64), np.zeros((0, 1), np.float32))

    assert teach(adapter, Sequences([], []), none, np.zeros(0, bool), Lesson(), seed=0) == 0.0
    assert all(np.array_equal(value, start[key]) for key, value in adapter.factors().items())
