"""Two tokenizations of the same texts: which token answers to which, and rows carried across.

Knows tokens' bytes, dynamic time warping and sparse rows. Does not know models or training.

FedMKT (arXiv 2406.02224) section 3.3 and algorithm 2; PAPERS.md 2 (b). For each *base* token
(student's) the *source* tokens (teacher's) matched with it:

    c(i, j)  Levenshtein distance of base token i and source token j, leading spaces removed
    M[i, j] = c(i, j) + min(M[i-1, j], M[i, j-1], M[i-1, j-1]),  traced back from the end

A base token with exactly one match j, equal to it or standing for it in the MinED table, gets the
source's row with every entry put through the table. Any other base token gets the one-hot row of
itself. Rows here speak of the token they stand at (`logit_rows.py`), so the one-hot row names the
*next* token of its context; the public code's names the token before (PAPERS.md 2 (e)).

Differences from the paper: entries that meet in one target token add up (the paper keeps the first
and the others' mass is lost); an entry without counterpart leaves its mass to the tail; rows are
not renormalised. The other alignment, `greedy`, matches tokens that begin at the same byte of the
text, which is where both models have read the same; the public code averages over groups instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_sdk.algorithms.logit_rows import LogitTable, Places
from edge_sdk.algorithms.vocabulary import NONE, Vocabulary
from edge_sdk.errors import LocalProtocolError

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U16 = npt.NDArray[np.uint16]

CELLS = 1 << 21
"""Cells of a warping matrix held at once, over all texts of a batch: 10 MB."""

Align = Callable[[Places, Vocabulary, Places, Vocabulary], I64]
"""base, its vocabulary, source, its vocabulary -> the source place of each base place, or NONE."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Soft targets at `places`: entry j of a row wants mass `mass[:, j]` on token `ids[:, j]`.

    Both are (places, k), int64 and float32. What a row lacks of 1 belongs to all other tokens
    together. An entry of no mass counts as absent.
    """

    places: Places
    ids: I64
    mass: F32


def carry(base: Places, source: LogitTable, table: I32, match: I64) -> Targets:
    """The source's rows in the base's tokens.

    `table` maps source ids to base ids (MinED); `match` is `dtw` or `greedy` of the two.

    Raises:
        LocalProtocolError: they are not about equally many texts, or `match` is of other places.
    """
    if base.texts != source.texts or len(match) != len(base.tokens):
        raise LocalProtocolError(f"{source.texts} texts cannot teach {base.texts}")
    n, k = len(base.tokens), source.kept
    ids, mass = np.zeros((n, k), np.int64), np.zeros((n, k), np.float32)
    ids[:, 0], mass[:, 0] = base.tokens, 1.0  # the fallback
    matched = np.flatnonzero(match != NONE)
    stands = table[source.places.tokens[match[matched]]] == base.tokens[matched]
    good = matched[stands]
    rows = match[good]
    ids[good], mass[good] = merged(table[source.ids[rows]], np.exp(source.logps[rows], dtype="f4"))
    return Targets(base, ids, mass)


def merged(ids: I32, mass: F32) -> tuple[I64, F32]:
    """Rows in which each token occurs once: masses of its later entries join the first, and
    entries NONE are emptied. Order and single entries stay as they are, bit for bit."""
    n, k = ids.shape
    order = np.argsort(ids, axis=1, kind="stable")  # so a group's first is the likeliest
    rows = np.arange(n)[:, None]
    ordered, weights = ids[rows, order], mass[rows, order]
    begins = np.ones((n, k), bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = np.cumsum(begins.ravel()) - 1
    sums = np.add.reduceat(weights.ravel(), np.flatnonzero(begins.ravel())) if n else weights
    whole = np.where(begins & (ordered != NONE), sums.ravel()[group].reshape(n, k), 0.0)
    out_ids, out = np.zeros((n, k), np.int64), np.zeros((n, k), np.float32)
    out_ids[rows, order] = np.where(whole > 0, ordered, 0)
    out[rows, order] = whole
    return out_ids, out


def greedy(base: Places, base_words: Vocabulary, source: Places, source_words: Vocabulary) -> I64:
    """For each base place the source place that begins at the same byte of the same text.

    Spaces before a token are not counted: WordPiece has them where the text has none.
    """
    there = _begins(source, source_words)
    here = _begins(base, base_words)
    order = np.argsort(there, kind="stable")
    found = np.searchsorted(there[order], here)
    place = order[np.minimum(found, max(len(order) - 1, 0))] if len(order) else found
    same = (found < len(order)) & (there[place] == here) if len(order) else found < 0
    result: I64 = np.where(same, place, NONE)
    return result


def _begins(places: Places, words: Vocabulary) -> I64:
    """A number for text and byte at which each place's token begins."""
    sizes = words.bare_sizes[places.tokens].astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    within = ends[:-1] - np.repeat(ends[places.starts[:-1]], np.diff(places.starts))
    result: I64 = (places.owner() << 32) + within
    return result


def dtw(base: Places, base_words: Vocabulary, source: Places, source_words: Vocabulary) -> I64:
    """For each base place its one match on the cheapest warping path; NONE where it has several."""
    match = np.full(len(base.tokens), NONE, np.int64)
    lengths = np.stack([np.diff(base.starts), np.diff(source.starts)])  # (2, texts)
    order = np.lexsort((lengths[1], lengths[0]))
    start = 0
    while start < len(order):
        end, widest = start, 0
        while end < len(order):  # texts of like length share a batch
            widest = max(widest, int(lengths[1, order[end]]))
            if (end - start + 1) * int(lengths[0, order[end]]) * widest > CELLS and end > start:
                break
            end += 1
        batch = order[start:end]
        batch, start = batch[(lengths[:, batch] > 0).all(axis=0)], end
        if not len(batch):
            continue
        costs = token_costs(base, base_words, source, source_words, batch)
        single = warp(costs, lengths[0, batch], lengths[1, batch])  # (B, T)
        for text, row in zip(batch.tolist(), single, strict=True):
            n = int(lengths[0, text])
            found = row[:n]
            where = slice(int(base.starts[text]), int(base.starts[text]) + n)
            match[where] = np.where(found == NONE, NONE, found + source.starts[text])
    return match


def token_costs(
    base: Places,
    base_words: Vocabulary,
    source: Places,
    source_words: Vocabulary,
    texts: npt.NDArray[np.intp],
) -> U16:
    """c(i, j) of each of `texts`, (T, S, B) for the longest; beyond a text's length 0."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    T = int(np.diff(base.starts)[texts].max())
    S = int(np.diff(source.starts)[texts].max())
    costs = np.zeros((len(texts), T, S), np.uint16)
    for row, text in enumerate(texts.tolist()):
        here = base.tokens[base.starts[text] : base.starts[text + 1]].tolist()
        there = source.tokens[source.starts[text] : source.starts[text + 1]].tolist()
        costs[row, : len(here), : len(there)] = cdist(
            [base_words.bare[i] for i in here],
            [source_words.bare[j] for j in there],
            scorer=Levenshtein.distance,
            dtype=np.uint16,
        )
    return np.ascontiguousarray(costs.transpose(1, 2, 0))


def warp(costs: U16, rows: I64, columns: I64) -> I64:
    """The single match of each row on each text's cheapest path, (B, T); NONE for several.

    `costs` is (T, S, B); text b has `rows[b]` rows and `columns[b]` columns. Of equally cheap ways
    to a cell the diagonal one is taken first, then the one from above, so that equal tokens are
    matched one by one.
    """
    T, S, B = costs.shape
    moves = _moves(costs).reshape(T, S, B)
    i, j, texts = rows - 1, columns - 1, np.arange(B)
    match, count = np.full((B, T), NONE, np.int64), np.zeros((B, T), np.int64)
    while len(texts):
        match[texts, i] = j
        count[texts, i] += 1
        going = (i > 0) | (j > 0)
        texts, i, j = texts[going], i[going], j[going]
        move = moves[i, j, texts]
        i, j = i - (move != _LEFT), j - (move != _UP)
    return np.where(count == 1, match, NONE)


def path_costs(costs: U16) -> I32:
    """M of the last cell of every text, (B,): the cost of its cheapest path through all of it."""
    result: I32 = _fill(costs, None)[-1]
    return result


_DIAGONAL, _UP, _LEFT = 0, 1, 2
_FAR = np.int32(1 << 30)


def _moves(costs: U16) -> npt.NDArray[np.uint8]:
    moves = np.empty((costs.shape[0] * costs.shape[1], costs.shape[2]), np.uint8)
    _fill(costs, moves)
    return moves


def _fill(costs: U16, moves: npt.NDArray[np.uint8] | None) -> I32:
    """Fill M by anti-diagonals, keeping the last two; cells of one do not depend on each other."""
    T, S, B = costs.shape
    flat = costs.reshape(T * S, B)
    before = np.full((T + 1, B), _FAR, np.int32)  # the diagonal d - 2, at row i + 1
    last = before.copy()  # the diagonal d - 1
    before[0] = 0  # so that cell (0, 0) comes from nowhere at no cost
    for d in range(T + S - 1):
        low, high = max(0, d - S + 1), min(T - 1, d) + 1
        cells = slice(d + low * (S - 1), d + (high - 1) * (S - 1) + 1, max(S - 1, 1))
        diagonal, up, left = before[low:high], last[low:high], last[low + 1 : high + 1]
        least = np.minimum(np.minimum(diagonal, up), left)
        if moves is not None:
            chosen = np.where(least == up, np.uint8(_UP), np.uint8(_LEFT))
            chosen[least == diagonal] = _DIAGONAL
            moves[cells] = chosen
        now = np.full((T + 1, B), _FAR, np.int32)
        now[low + 1 : high + 1] = least + flat[cells]
        before, last = last, now
    return last
