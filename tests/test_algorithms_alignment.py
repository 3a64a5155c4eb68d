"""Vocabulary tables against brute force, warping against exhaustive search, rows carried across."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edge_sdk.algorithms.alignment import (
    Align,
    Targets,
    carry,
    dtw,
    greedy,
    merged,
    path_costs,
    warp,
)
from edge_sdk.algorithms.logit_rows import LogitTable, Places
from edge_sdk.algorithms.vocabulary import (
    NONE,
    Vocabulary,
    cached_table,
    mined_table,
    sentence_piece,
    word_piece,
)
from edge_sdk.errors import LocalProtocolError


def levenshtein(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def words(*surfaces: str) -> Vocabulary:
    return Vocabulary(tuple(s.encode() for s in surfaces))


def places(vocabulary: Vocabulary, *texts: tuple[str, ...]) -> Places:
    ids = [[vocabulary.surfaces.index(t.encode()) for t in text] for text in texts]
    return Places.of(ids, [0] * len(ids))


def table_of(at: Places, vocabulary: int, kept: int, *, seed: int = 0) -> LogitTable:
    rng = np.random.default_rng(seed)
    n = len(at.tokens)
    logits = rng.normal(size=(n, vocabulary)) * 3
    logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logps, axis=1)[:, :kept]
    kept_logps = np.take_along_axis(logps, ids, axis=1)
    truth = logps[np.arange(n), at.tokens]
    return LogitTable(
        at, truth.astype(np.float32), ids.astype(np.int32), kept_logps.astype(np.float16)
    )


def carried(
    base: Places,
    base_words: Vocabulary,
    source: LogitTable,
    source_words: Vocabulary,
    align: Align = dtw,
) -> Targets:
    match = align(base, base_words, source.places, source_words)
    return carry(base, source, mined_table(source_words, base_words), match)


# --- MinED ----------------------------------------------------------------------------------------


def test_mined_is_the_brute_force_answer_with_ties_in_byte_order() -> None:
    rng = np.random.default_rng(5)

    def random_words(n: int, letters: str) -> list[str]:
        made = {"".join(rng.choice(list(letters), rng.integers(1, 9))) for _ in range(n)}
        return sorted(made, key=lambda w: rng.random())

    source, target = words(*random_words(200, "abcd ")), words(*random_words(300, "abce "))

    table = mined_table(source, target)

    ties = 0
    for i, surface in enumerate(source.surfaces):
        far = [levenshtein(surface, other) for other in target.surfaces]
        nearest = [w for w, d in zip(target.surfaces, far, strict=True) if d == min(far)]
        assert target.surfaces[table[i]] == min(nearest)
        ties += len(nearest) > 1
    assert ties > 20, "a test of ties needs some"


def test_the_papers_example() -> None:
    small, large = words("util", "ize", " we"), words("utilize", " we")

    assert mined_table(small, large).tolist()[0] == 0  # util -> utilize
    assert mined_table(large, small).tolist()[0] == 0  # utilize -> util

    base = places(small, (" we", "util", "ize"))
    source = table_of(places(large, (" we", "utilize")), len(large), 2)
    targets = carried(base, small, source, large)

    assert targets.ids[1].tolist() == [0, 2] or targets.ids[1].tolist() == [2, 0]  # taught
    assert targets.mass[1].min() < 1.0
    assert (targets.ids[2, 0], targets.mass[2].tolist()) == (1, [1.0, 0.0])  # "ize": fallback


def test_a_special_token_meets_only_its_namesake() -> None:
    source = Vocabulary((b"", b"", b"end"), (("<end>", 0), ("<pad>", 1)))
    target = Vocabulary((b"en", b"", b"<pad>"), (("<end>", 1),))

    assert mined_table(source, target).tolist() == [1, NONE, 0]


def test_every_way_of_writing_a_space_says_the_same() -> None:
    corpus = ["the cat sat on the mat", "the dog sat on the cat"] * 4
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=290, special_tokens=["<end>"])
    )
    vocabulary = Vocabulary.of(byte_level)

    ids = byte_level.encode("the cat sat\n").ids
    assert b"".join(vocabulary.surfaces[i] for i in ids) == b"the cat sat\n"[: len(b"the cat sat")]
    assert vocabulary.specials == (("<end>", 0),)
    assert vocabulary.surfaces[0] == b""
    assert sentence_piece("▁the") == word_piece("the") == b" the"
    assert sentence_piece("<0x0A>") == b"\n"
    assert word_piece("##ize") == b"ize"


def test_a_table_is_kept_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    source, target = words("ab", "abc", "x"), words("abd", "y")
    table = cached_table(source, target, tmp_path)

    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    assert cached_table(source, target, tmp_path).tolist() == table.tolist()
    assert path.stat().st_mtime_ns == stamp

    for damage in (b"", b"no table", path.read_bytes()[:-2]):
        path.write_bytes(damage)
        assert cached_table(source, target, tmp_path).tolist() == table.tolist()
    np.save(path, np.array([0, 5, 0], np.int32))  # outside the target
    assert cached_table(source, target, tmp_path).tolist() == table.tolist()
    assert len(list(tmp_path.iterdir())) == 1


# --- sequences ------------------------------------------------------------------------------------


def cheapest(costs: np.ndarray) -> int:
    """Over all monotone paths, by trying them."""
    T, S = costs.shape

    def below(i: int, j: int) -> int:
        rest = [below(a, b) for a, b in ((i + 1, j), (i, j + 1), (i + 1, j + 1)) if a < T and b < S]
        return int(costs[i, j]) + (min(rest) if rest else 0)

    return below(0, 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_warping_costs_what_the_best_of_all_paths_costs(T: int, S: int, rng: object) -> None:
    costs = np.array(
        [[[rng.randint(0, 4)] for _ in range(S)] for _ in range(T)],  # type: ignore[attr-defined]
        np.uint16,
    )

    assert int(path_costs(costs)[0]) == cheapest(costs[:, :, 0])


def test_a_batch_of_unlike_lengths_is_warped_as_each_text_alone() -> None:
    rng = np.random.default_rng(1)
    shapes = [(int(a), int(b)) for a, b in rng.integers(1, 9, (40, 2))]
    batch = np.zeros((8, 8, 40), np.uint16)
    alone = []
    for n, (T, S) in enumerate(shapes):
        batch[:T, :S, n] = rng.integers(0, 4, (T, S))
        one = np.ascontiguousarray(batch[:T, :S, n : n + 1])
        alone.append(warp(one, np.array([T]), np.array([S]))[0])

    together = warp(batch, np.array([s[0] for s in shapes]), np.array([s[1] for s in shapes]))

    for row, found, (T, _) in zip(together, alone, shapes, strict=True):
        assert row[:T].tolist() == found.tolist()


def test_equal_tokenizers_teach_exactly_what_they_say() -> None:
    vocabulary = words(" a", " b", "a", "b", "ab", " ab")
    texts = [("a", " a", " a", "b"), (" b",), ("ab", " ab", "ab", " ab", "b")]
    at = places(vocabulary, *texts)
    source = table_of(at, len(vocabulary), 4)
    table = mined_table(vocabulary, vocabulary)

    for align in (dtw, greedy):
        targets = carried(at, vocabulary, source, vocabulary, align)

        assert table.tolist() == list(range(len(vocabulary)))
        assert align(at, vocabulary, at, vocabulary).tolist() == list(range(len(at.tokens)))
        assert np.array_equal(targets.ids, source.ids)
        probs = np.exp(source.logps.astype(np.float32))
        assert targets.mass.tobytes() == probs.tobytes()
        assert (targets.mass / targets.mass.sum(1, keepdims=True)).tobytes() == (
            probs / probs.sum(1, keepdims=True)
        ).tobytes()


def test_a_fallback_row_names_the_next_token_and_never_the_present_one() -> None:
    base_words, source_words = words("ab", "cd", " ef", "x"), words("a", "b", "cd", " ef", "x")
    base = places(base_words, ("ab", "cd", " ef", "ab", "x"))
    source = table_of(
        places(source_words, ("a", "b", "cd", " ef", "a", "b", "x")), len(source_words), 3
    )

    targets = carried(base, base_words, source, source_words)

    context = ["(start)", "ab", "cd", " ef", "ab"]  # what is read before each row
    text = ["ab", "cd", " ef", "ab", "x"]
    alone = np.flatnonzero(targets.mass[:, 0] == 1.0).tolist()
    assert alone == [0, 3]  # "ab" answers to two tokens
    for row in alone:
        said = base_words.surfaces[targets.ids[row, 0]].decode()
        assert said == text[row] != context[row]


def test_greedy_matches_what_begins_at_the_same_byte() -> None:
    base_words, source_words = words(" one", " two", "s", " x"), words(" on", "e", " twos", " x")
    base = places(base_words, (" one", " two", "s", " x"), (" x",))
    source = places(source_words, (" on", "e", " twos", " x"), (" x",))

    assert greedy(base, base_words, source, source_words).tolist() == [0, 2, NONE, 3, 4]


def test_entries_that_meet_add_up_and_those_without_counterpart_go_to_the_tail() -> None:
    ids, mass = merged(
        np.array([[7, 3, 7, NONE], [NONE, NONE, NONE, NONE]], np.int32),
        np.array([[0.4, 0.3, 0.2, 0.05], [0.1, 0.1, 0.1, 0.1]], np.float32),
    )

    assert ids[0, :2].tolist() == [7, 3]
    assert mass[0] == pytest.approx([0.6, 0.3, 0.0, 0.0])
    assert mass[1].sum() == 0.0


def test_texts_of_another_number_teach_nothing() -> None:
    vocabulary = words("a", "b")
    source = table_of(places(vocabulary, ("a",)), 2, 1)
    with pytest.raises(LocalProtocolError, match="1 texts cannot teach 2"):
        carry(
            places(vocabulary, ("a",), ("b",)),
            source,
            mined_table(vocabulary, vocabulary),
            np.array([0, 0]),
        )


def test_texts_without_places_are_no_trouble() -> None:
    vocabulary = words("a", "b")
    base, source = places(vocabulary, (), ("a",)), places(vocabulary, ("b",), ())

    for align, shape in itertools.product((dtw, greedy), ((base, source), (base, base))):
        found = align(shape[0], vocabulary, shape[1], vocabulary)
        assert found.shape == (1,)
