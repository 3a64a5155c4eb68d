"""Draws training batches.  Knows nothing about weights.

Every batch is a pure function of (recipe, step): that is what makes a run resumable.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from examples.models.recipes import Recipe
from examples.models.tokenizer import BERT_SPECIALS, END

IGNORED = -100  # torch's label for "no loss here"
MASK_SHARE = 0.20  # BERT's is 0.15; a small step needs more gaps


@dataclass(frozen=True, slots=True)
class Tokens:
    """One stream's shuffled documents in one row of tokens, each preceded by a separator."""

    ids: np.ndarray  # (n_tokens,) int32
    starts: np.ndarray  # (n_documents,) int64, positions of the separators
    size_bytes: int


def encode(tokenizer: Tokenizer, texts: list[str], *, seed: int) -> Tokens:
    """Shuffle and tokenize documents."""
    separator = tokenizer.token_to_id(END)
    if separator is None:
        separator = tokenizer.token_to_id("[SEP]")
    order = np.random.default_rng(seed).permutation(len(texts))
    encoded = tokenizer.encode_batch([texts[i] for i in order], add_special_tokens=False)
    rows = [[separator, *one.ids] for one in encoded]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if rows else np.zeros(0, np.int64)
    return Tokens(ids, starts, sum(len(text.encode()) for text in texts))


def draw(streams: list[Tokens], weights: np.ndarray, recipe: Recipe, step: int) -> np.ndarray:
    """The windows of one step, (windows, length + 1): each stream by its weight, at a random place.

    A window that would start inside a short document starts at its separator or just behind it, so
    that the models see requests from their first word.
    """
    rng = np.random.default_rng((recipe.seed, step))
    span = recipe.length + 1
    rows = []
    for index in rng.choice(len(streams), size=recipe.windows, p=weights):
        stream = streams[index]
        place = int(rng.integers(len(stream.ids)))
        start = int(stream.starts[np.searchsorted(stream.starts, place, side="right") - 1])
        if place - start < recipe.length:
            place = start + int(rng.integers(2))
        rows.append(np.take(stream.ids, np.arange(place, place + span), mode="wrap"))
    return np.stack(rows)


def pairs(window: np.ndarray, recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the model reads, what it must say), both (windows, length)."""
    tokens = torch.from_numpy(window).long()
    if recipe.masked:
        return mask(tokens[:, :-1], recipe, step)
    return tokens[:, :-1], tokens[:, 1:]


def mask(tokens: torch.Tensor, recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking: 20 % of tokens; of these 80 % [MASK], 10 % random, 10 % as they were."""
    special = len(BERT_SPECIALS)
    first_id, last_id, mask_id = (BERT_SPECIALS.index(m) for m in ("[CLS]", "[SEP]", "[MASK]"))
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    given = tokens.clone()
    given[:, 0], given[:, -1] = first_id, last_id
    chosen = (torch.rand(given.shape, generator=rng) < MASK_SHARE) & (given >= special)
    labels = torch.where(chosen, given, IGNORED)
    dice = torch.rand(given.shape, generator=rng)
    other = torch.randint(special, recipe.vocabulary, given.shape, generator=rng)
    given = torch.where(chosen & (dice < 0.8), mask_id, given)
    return torch.where(chosen & (dice >= 0.9), other, given), labels
