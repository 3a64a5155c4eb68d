"""Prompts, label words, scoring: one pass and many passes agree, padding changes nothing."""

import pytest
import torch
from learning_world import TASK, examples, folder, model, tokenizer

from edge_sdk.errors import ConfigError, DataError
from edge_sdk.train.text_task import (
    Sequences,
    TaskReader,
    accuracy,
    label_probs,
    logits_at,
    padded,
    token_log_probs,
    word_log_probs,
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_reads_prompts_and_answers_of_a_folder(tmp_path):
    reader = TaskReader.from_folder(TASK, folder(tmp_path / "m"), max_tokens=1000)

    batch = reader.labelled(["the red cat", "add two"], ["list", "sum"])

    assert reader.max_tokens == 64  # the model's context
    assert [len(ids) - start for ids, start in zip(batch.ids, batch.starts, strict=True)] == [1, 1]
    assert batch.ids[0][-1] == tokenizer().token_to_id("\u0120list")
    with pytest.raises(DataError, match="poem"):
        reader.labelled(["x"], ["poem"])


def test_a_folder_without_configuration_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        TaskReader.from_folder(TASK, tmp_path)


def test_only_chosen_places_pass_the_output_layer_and_padding_is_harmless():
    net = model()
    short, long = [5, 6, 7], [8, 9, 10, 11, 12, 13]

    got = logits_at(net, padded([short, long]), torch.tensor([0, 1]), torch.tensor([2, 4]))

    alone = net(input_ids=torch.tensor([short])).logits[0, 2]
    whole = net(input_ids=torch.tensor([long])).logits[0, 4]
    torch.testing.assert_close(got, torch.stack([alone, whole]), rtol=1e-4, atol=1e-5)


def test_one_pass_agrees_with_summed_passes_for_one_token_words():
    net, reader = model(), TaskReader(TASK, tokenizer(), max_tokens=32)
    prompts = reader.prompts([text for text, _ in examples(7, seed=1)])
    assert reader.one_token_decides

    fast = word_log_probs(net, reader, prompts)
    reader.one_token_decides = False
    slow = word_log_probs(net, reader, prompts)

    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_token_log_probs_sum_to_the_models_own_loss():
    net = model()
    row = [5, 6, 7, 8, 9]

    log_p, owner = token_log_probs(net, Sequences([row], [1]))

    loss = net(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss
    assert owner.tolist() == [0] * 4
    assert float(-log_p.mean()) == pytest.approx(float(loss.detach()), rel=1e-4)


def test_probabilities_keep_the_order_of_texts_and_temperature_flattens():
    net, reader = model(), TaskReader(TASK, tokenizer(), max_tokens=32)
    texts = [text for text, _ in examples(40, seed=2)] + ["dog", "add " * 40]

    probs = label_probs(net, reader, texts)

    assert probs.shape == (42, 3)
    torch.testing.assert_close(probs.sum(1), torch.ones(42))
    torch.testing.assert_close(probs[3:4], label_probs(net, reader, texts[3:4]))
    flat = label_probs(net, reader, texts, temperature=100.0)
    assert float(flat.max()) < float(probs.max())
    wanted = [TASK.labels[i] for i in probs.argmax(1).tolist()]
    assert accuracy(net, reader, texts, wanted) == 1.0
    with pytest.raises(DataError):
        accuracy(net, reader, [], [])
