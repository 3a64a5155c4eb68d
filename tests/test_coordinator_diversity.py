"""Each measure of diversity against what it should say of texts made by hand."""

import pytest

from coordinator.diversity import distinct, diversity, names_label, repetitions, self_bleu

VARIED = [
    "where can I buy fresh bread today",
    "the capital of France lies on the Seine",
    "explain how rockets leave the ground",
    "list three uses for an old newspaper",
]
COLLAPSED = ["tell me about the weather please"] * 4


def test_a_collapsed_writer_moves_every_measure() -> None:
    good, bad = diversity(VARIED), diversity(COLLAPSED)

    assert bad.distinct_1 < good.distinct_1
    assert bad.distinct_2 < good.distinct_2
    assert bad.self_bleu == pytest.approx(1.0)
    assert good.self_bleu < 0.05
    assert (good.repeated, good.near) == (0.0, 0.0)
    assert bad.repeated == 0.75


def test_distinct_counts_different_runs_of_words() -> None:
    assert distinct(["a b a b"], 1) == pytest.approx(2 / 4)
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)  # ab, ba, ab
    assert distinct(["", "a"], 2) == 0.0


def test_self_bleu_by_hand() -> None:
    # "a b c" against "a b d": words 2 of 3, pairs 1 of 2, triples 0 of 1.
    assert self_bleu(["a b c", "a b d"], order=2) == pytest.approx((2 / 3 * 1 / 2) ** 0.5)
    assert self_bleu(["a b c", "a b d"], order=3) == 0.0


def test_self_bleu_does_not_take_a_text_as_its_own_reference() -> None:
    assert self_bleu(["one two three four", "five six seven eight"]) == 0.0
    assert self_bleu(["alone"]) == 0.0


def test_a_run_counts_no_oftener_than_another_text_has_it() -> None:
    assert self_bleu(["go go go go", "go on"], order=1) == pytest.approx((1 / 4 + 1 / 2) / 2)


def test_repetitions_tell_the_same_from_the_nearly_same() -> None:
    texts = [
        "name the five largest rivers in the world",
        "Name the  five largest rivers in the world",
        "name the five largest rivers in the world today",
        "name a colour",
    ]

    assert repetitions(texts) == ["", "same", "near", ""]


def test_a_label_named_in_words_is_found_and_part_of_a_word_is_not() -> None:
    assert names_label("A closed QA about sport", "closed qa")
    assert not names_label("the sporty type", "sport")
    assert not names_label("anything", " ")
