"""A small model gains from an LLM of another tokenizer, beyond its own texts and the labels."""

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
FEW = 12
"""Private texts of the small model."""


def test_a_small_model_learns_more_from_the_llm_than_from_the_labels() -> None:
    """Against private and public cross-entropy alone, and a shuffled LLM; paired, five seeds."""
    torch.set_num_threads(1)
    rows = []
    for seed in SEEDS:
        public = corpus(PUBLIC, seed=100 + seed)
        well_read = peer("llm", corpus(PRIVATE, seed=7 * seed), seed=seed)
        read(well_read, Lesson(1.0, 50, 16, 2e-2), seed=seed)
        teacher = Peer(well_read.adapter, reader_of("words"), public, HELD_OUT, whole=True)
        device = peer("pieces", corpus(FEW, seed=500 + seed), seed=seed)
        read(device, Lesson(1.0, 15, 8, 1e-2), seed=seed)
        pupil = Peer(device.adapter, reader_of("pieces"), public, HELD_OUT, whole=True)
        how = Lesson(0.9, 30, 8, 1e-2)
        rows.append(taught_bits(pupil, pupil.adapter.factors(), [teacher], how, seed=seed))

    assert gain(rows, over="labels only") > T_95
    assert gain(rows, over="teachers shuffled") > T_95
