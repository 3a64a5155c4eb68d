"""The large model: it writes repeatably, and each loss of CrossLM does what its formula says."""

import numpy as np
import pytest
import torch
from learning_world import TASK, examples, folder, tokenizer

from coordinator.llm import (
    Llm,
    Update,
    draw,
    generation_loss,
    quality_loss,
    regulariser,
    understanding_loss,
)
from edge_sdk.errors import LocalProtocolError
from edge_sdk.train.lora import LoraSpec
from edge_sdk.train.text_task import Sequences

SPEC = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
LABELS = [TASK.labels[i % 3] for i in range(24)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    return folder(tmp_path_factory.mktemp("llm") / "model", seed=4)


@pytest.fixture
def llm(home):
    return Llm(home, TASK, SPEC, seed=0, dtype=torch.float32)


def slope_at(p, s):
    """d L_gen / d logit of the written token, for a two-token vocabulary at probability p."""
    logit = torch.tensor([np.log(p / (1 - p))], requires_grad=True)
    loss = quality_loss(
        torch.nn.functional.logsigmoid(logit), torch.tensor([0]), torch.tensor([float(s)])
    )
    loss.backward()
    return float(logit.grad)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_generation_gradient_raises_good_and_lowers_bad_texts(p):
    assert slope_at(p, 1.0) < 0
    assert slope_at(p, 0.0) > 0
    for s in (0.0, 0.2, 0.7, 1.0):
        assert slope_at(p, s) == pytest.approx(p - s, abs=1e-5)


@pytest.mark.parametrize("s", [0.1, 0.5, 0.8])
def test_generation_gradient_vanishes_where_p_equals_s(s):
    assert slope_at(s, s) == pytest.approx(0.0, abs=1e-6)


def test_generation_loss_is_the_formula_with_length_normalisation(llm):
    batch = Sequences([[3, 4, 5, 6, 7], [3, 4, 8]], [2, 1])
    s = torch.tensor([0.8, 0.3])

    got = float(generation_loss(llm.adapter, batch, s).detach())

    wanted = 0.0
    for ids, start, score in zip(batch.ids, batch.starts, s.tolist(), strict=True):
        with torch.no_grad():
            p = llm.adapter.model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        terms = [
            score * np.log(float(p[t - 1, ids[t]]))
            + (1 - score) * np.log(1 - float(p[t - 1, ids[t]]))
            for t in range(start, len(ids))
        ]
        wanted -= np.mean(terms) / 2
    assert got == pytest.approx(wanted, rel=1e-4)


def test_the_loss_stays_finite_where_the_model_is_certain():
    loss = quality_loss(torch.zeros(1), torch.tensor([0]), torch.tensor([0.0]))
    assert torch.isfinite(loss)


def test_permuted_feedback_changes_the_gradient(llm):
    written = llm.generate(LABELS, seed=1)
    s = np.linspace(0.05, 0.95, len(LABELS)).astype(np.float32)

    def gradient(scores):
        loss = generation_loss(llm.adapter, written.sequences, torch.from_numpy(scores))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, llm.adapter.parameters())])

    right, permuted = gradient(s), gradient(np.random.default_rng(0).permutation(s))
    assert float((right - permuted).norm()) > 0.05 * float(right.norm())


def test_understanding_is_the_loss_of_the_label_word(llm):
    ids = torch.tensor(llm.reader.labelled(["the red cat"], ["story"]).ids)
    targets = torch.tensor([[0.0, 1.0, 0.0]])

    got = understanding_loss(llm.adapter, llm.reader, llm.reader.prompts(["the red cat"]), targets)

    with torch.no_grad():
        log_p = llm.adapter.model(input_ids=ids[:, :-1]).logits[0, -1].log_softmax(-1)
    assert float(got.detach()) == pytest.approx(-float(log_p[ids[0, -1]]), rel=1e-4)


def test_regulariser_is_zero_at_the_start_and_positive_after_a_change(llm):
    rows = [[3, 4, 5, 6], [7, 8, 9]]
    assert float(regulariser(llm.adapter, rows).detach()) == pytest.approx(0.0, abs=1e-6)

    changed = {k: v + np.float32(0.3) for k, v in llm.state().items()}
    llm.load(changed)

    loss = regulariser(llm.adapter, rows)
    assert float(loss.detach()) > 1e-3
    loss.backward()
    assert any(float(p.grad.abs().max()) > 0 for p in llm.adapter.parameters())


def test_the_regulariser_binds(llm):
    """With lambda the model strays less from its start on generic text, at the same steps."""
    written = llm.generate(LABELS, seed=1)
    scores = [0.9 if i % 2 else 0.1 for i in range(len(LABELS))]
    start = llm.state()

    def drift(reg):
        llm.load(start)
        llm.update(written, scores, Update(reg=reg, lr=2e-2, steps=15, batch=8), seed=0)
        return float(regulariser(llm.adapter, llm.generic).detach())

    assert drift(reg=5.0) < 0.7 * drift(reg=0.0)


def test_generation_repeats_itself_and_stops_at_the_line_end(llm):
    first, again = llm.generate(LABELS, seed=5), llm.generate(LABELS, seed=5)
    other = llm.generate(LABELS, seed=6)

    assert first == again
    assert first.texts != other.texts
    assert first.labels == LABELS
    assert not any("\n" in text for text in first.texts)
    newline = tokenizer().token_to_id("\u010a")
    for row, start in zip(first.sequences.ids, first.sequences.starts, strict=True):
        assert row[:start] != row
        assert newline not in row[start:-1]
        assert len(row) - start <= 40


def test_cached_sampling_follows_the_models_own_probabilities(llm):
    """Greedy in the limit: every token written is the most probable one after all before it."""
    written = llm.generate(LABELS[:6], seed=0, temperature=1e-4, max_new_tokens=12)

    for ids, start in zip(written.sequences.ids, written.sequences.starts, strict=True):
        with torch.no_grad():
            logits = llm.adapter.model(input_ids=torch.tensor([ids])).logits[0]
        for t in range(start, len(ids)):
            best = float(logits[t - 1].max())
            assert float(logits[t - 1, ids[t]]) == pytest.approx(best, abs=1e-3)


def test_top_p_draws_only_from_the_head():
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.08, 0.02]])).repeat(500, 1)
    rng = torch.Generator().manual_seed(0)

    drawn = draw(logits, rng, 1.0, 0.7)

    assert set(drawn.tolist()) == {0, 1}
    assert float((drawn == 0).float().mean()) == pytest.approx(2 / 3, abs=0.08)


def test_it_learns_the_task_from_judged_texts_alone(llm):
    """Texts that carry the sign of their label are liked, others are not: both skills improve."""
    rows = examples(48, seed=3)
    frame = [llm.reader.tokenizer.encode(f"Kind: {label}\nRequest:").ids for _, label in rows]
    texts = [llm.reader.tokenizer.encode(f" {text}\n").ids for text, _ in rows]
    written = llm.generate([label for _, label in rows], seed=0)
    written.texts[:] = [text for text, _ in rows]
    written = type(written)(
        written.texts,
        written.labels,
        Sequences([a + b for a, b in zip(frame, texts, strict=True)], [len(a) for a in frame]),
    )
    held_texts, held_labels = zip(*examples(40, seed=8), strict=True)
    before = llm.accuracy(held_texts, held_labels)

    losses = llm.update(written, [0.95] * 48, Update(lr=2e-2, steps=50, batch=16, reg=0.05), seed=0)

    assert llm.accuracy(held_texts, held_labels) > max(0.7, before + 0.2)
    assert set(losses) == {"gen", "und", "reg"}
    assert all(np.isfinite(value) for value in losses.values())


def test_it_learns_the_task_from_opinions_on_public_texts(llm):
    texts, labels = zip(*examples(48, seed=3), strict=True)
    opinions = np.full((48, 3), 0.1, np.float32)
    opinions[np.arange(48), [TASK.labels.index(label) for label in labels]] = 0.8
    held_texts, held_labels = zip(*examples(40, seed=8), strict=True)
    written = llm.generate(LABELS, seed=0)

    how = Update(lr=2e-2, steps=50, batch=16, reg=0.05)
    llm.update(written, [0.0] * len(LABELS), how, seed=0, public=texts, opinions=opinions)

    assert llm.accuracy(held_texts, held_labels) > 0.7


def test_opinions_must_pair_up_with_public_texts(llm):
    written = llm.generate(LABELS[:2], seed=0)
    with pytest.raises(LocalProtocolError, match="one opinion"):
        llm.update(written, [0.5, 0.5], Update(steps=1), seed=0, public=["a cat"])


def test_scores_must_pair_up_and_be_probabilities(llm):
    written = llm.generate(LABELS[:2], seed=0)
    for scores in ([0.5], [0.5, 1.5], [0.5, float("nan")]):
        with pytest.raises(LocalProtocolError, match="one score"):
            llm.update(written, scores, Update(steps=1), seed=0)
