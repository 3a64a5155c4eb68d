"""How varied written texts are: repetition within a text set, and texts that give their label away.

Knows strings. Does not know who wrote them, models or rounds.

A generator that collapses writes the same good text again and again; every measure here moves when
it does (PAPERS.md 1 (g)).
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

SHINGLE = 3
"""Words in a row by which near-duplicates are compared."""

NEAR = 0.6
"""Texts that share this much of their shingles (Jaccard) are near-duplicates."""


@dataclass(frozen=True, slots=True)
class Diversity:
    """Measures of one set of texts, all in [0, 1].

    Attributes:
        distinct_1, distinct_2: share of different words, and word pairs, among all.
        self_bleu: mean similarity of each text to the others; 1 when all are the same.
        repeated: share of texts equal to an earlier one but for case and spacing.
        near: share of further texts that are nearly an earlier one.
    """

    distinct_1: float
    distinct_2: float
    self_bleu: float
    repeated: float
    near: float

    def told(self) -> dict[str, float]:
        """For a Note."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def diversity(texts: Sequence[str]) -> Diversity:
    """Measure `texts`; all measures of no texts are 0."""
    repeats = repetitions(texts)
    return Diversity(
        distinct(texts, 1),
        distinct(texts, 2),
        self_bleu(texts),
        sum(kind == "same" for kind in repeats) / max(1, len(texts)),
        sum(kind == "near" for kind in repeats) / max(1, len(texts)),
    )


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different runs of `n` words among all such runs; 0 if there are none.

    Source: Li et al. 2016, arXiv 1510.03055, section 5.
    """
    runs = [run for text in texts for run in _runs(_words(text), n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def self_bleu(texts: Sequence[str], *, order: int = 4) -> float:
    """Mean BLEU of each text with all others as its references, in [0, 1].

    A run of n words counts as often as it occurs in the one other text that has it most often;
    orders that a text is too short for are left out, and no brevity penalty is taken: the nearest
    of many references is seldom of another length.

    Source: Zhu et al. 2018 (Texygen), arXiv 1802.01886, section 4; BLEU's clipped counts.
    """
    rows = [_words(text) for text in texts]
    if len(rows) < 2:
        return 0.0
    logs: list[list[float]] = [[] for _ in rows]
    for n in range(1, order + 1):
        counts = [Counter(_runs(row, n)) for row in rows]
        first, second, whose = _two_most(counts)
        for i, own in enumerate(counts):
            total = sum(own.values())
            if total:
                hits = sum(
                    min(times, second[run] if whose[run] == i else first[run])
                    for run, times in own.items()
                )
                logs[i].append(math.log(hits / total) if hits else -math.inf)
    scores = [math.exp(sum(log) / len(log)) if log else 0.0 for log in logs]
    return sum(scores) / len(scores)


def repetitions(texts: Sequence[str]) -> list[str]:
    """For each text "same", "near" or "": whether an earlier one, itself "", is like it."""
    seen: set[str] = set()
    kept: list[set[str]] = []
    by_run: dict[str, list[int]] = {}
    found = []
    for text in texts:
        name, runs = fingerprint(text), _shingles(text)
        if name in seen:
            found.append("same")
            continue
        seen.add(name)
        others = {i for run in runs for i in by_run.get(run, ())}
        if any(len(runs & kept[i]) >= NEAR * len(runs | kept[i]) for i in others):
            found.append("near")
            continue
        for run in runs:
            by_run.setdefault(run, []).append(len(kept))
        kept.append(runs)
        found.append("")
    return found


def fingerprint(text: str) -> str:
    """The text without case and spacing, hashed: equal for repetitions, unreadable in a log."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def names_label(text: str, word: str) -> bool:
    """Whether `text` says the label `word` itself, one word or several in a row."""
    said, sought = _words(text), _words(word)
    return bool(sought) and tuple(sought) in set(_runs(said, len(sought)))


def _two_most(
    counts: Sequence[Counter[tuple[str, ...]]],
) -> tuple[Counter[tuple[str, ...]], Counter[tuple[str, ...]], dict[tuple[str, ...], int]]:
    """Highest and second highest count of each run among texts, and whose the highest is."""
    first: Counter[tuple[str, ...]] = Counter()
    second: Counter[tuple[str, ...]] = Counter()
    whose: dict[tuple[str, ...], int] = {}
    for i, own in enumerate(counts):
        for run, times in own.items():
            if times > first[run]:
                second[run] = first[run]
                first[run], whose[run] = times, i
            elif times > second[run]:
                second[run] = times
    return first, second, whose


def _shingles(text: str) -> set[str]:
    words = _words(text)
    n = min(SHINGLE, len(words))
    return {" ".join(run) for run in _runs(words, n)} if n else set()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
