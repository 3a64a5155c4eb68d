"""The LLM gains from small models of other tokenizers, beyond what the labels teach it."""

import torch
from mkt_world import reader_of
from planted_world import (
    HELD_OUT,
    PRIVATE,
    PUBLIC,
    T_95,
    Peer,
    corpus,
    gain,
    peer,
    read,
    taught_bits,
)

from edge_sdk.train.teaching import Lesson

SEEDS = range(5)


def test_the_llm_learns_more_with_teachers_than_without_or_with_shuffled_ones() -> None:
    """Paired over five seeds, with lambda 0.9 as in the paper."""
    torch.set_num_threads(1)
    rows = []
    for seed in SEEDS:
        public = corpus(PUBLIC, seed=100 + seed)
        teachers = []
        for n, family in enumerate(("pieces", "words")):
            private = peer(family, corpus(PRIVATE, seed=7 * seed + n), seed=seed)
            read(private, Lesson(1.0, 50, 16, 2e-2), seed=seed)
            told = Peer(private.adapter, reader_of(family), public, HELD_OUT, whole=True)
            teachers.append(told)
        pupil = peer("llm", public, seed=seed)
        how = Lesson(0.9, 40, 8, 1e-2)
        rows.append(taught_bits(pupil, pupil.adapter.factors(), teachers, how, seed=seed))

    assert gain(rows, over="labels only") > T_95
    assert gain(rows, over="teachers shuffled") > T_95
