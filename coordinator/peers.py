"""Models that teach each other on public texts: what each says, who is the better, who learns.

Knows one model's adapter, reader and tokens of the public texts, and the bridge between two of
them. Does not know devices, rounds or messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_sdk.algorithms.alignment import Align, Targets, carry, dtw
from edge_sdk.algorithms.logit_rows import LogitTable, Places
from edge_sdk.algorithms.vocabulary import Vocabulary, cached_table, mined_table
from edge_sdk.errors import ConfigError
from edge_sdk.train.lora import Adapter
from edge_sdk.train.teaching import (
    Lesson,
    Pairs,
    lesson_texts,
    logit_table,
    places_of,
    target_bytes,
    target_losses,
    teach,
    whole_target,
)
from edge_sdk.train.text_task import TaskReader

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class Peer:
    """One model on the public texts, with the factors that its adapter holds at the time.

    Attributes:
        rows, places: the texts as its tokens, and which of them are to be predicted.
        words: its vocabulary.

    Raises:
        DataError: a label is not of the task, or a whole text has too many tokens.
    """

    def __init__(
        self, adapter: Adapter, reader: TaskReader, pairs: Pairs, held_out: Pairs, *, whole: bool
    ) -> None:
        self.adapter = adapter
        self.rows = lesson_texts(reader, pairs, whole=whole)
        self.places = places_of(self.rows)
        self.words = Vocabulary.of(reader.tokenizer)
        self._held_rows = lesson_texts(reader, held_out, whole=whole)
        self._held_bytes = int(target_bytes(reader, held_out, whole=whole).sum())

    def table(self, kept: int) -> LogitTable:
        """What it finds likeliest at every place."""
        model = self.adapter.model
        return logit_table(model, self.rows, kept=kept, vocabulary=len(self.words))

    def losses(self) -> F32:
        """Cross-entropy of each text's target, summed, in nats, (texts,)."""
        return target_losses(self.adapter.model, self.rows)

    def learn(
        self, targets: Targets, chosen: npt.NDArray[np.bool_], how: Lesson, *, seed: int
    ) -> float:
        """Learn the labels, and of the `chosen` texts the targets; the last loss."""
        return teach(self.adapter, self.rows, targets, chosen, how, seed=seed)

    def held_out_bits(self) -> float | None:
        """Bits per byte of the held-out texts' targets; None without such texts."""
        if not self._held_bytes:
            return None
        nats = float(target_losses(self.adapter.model, self._held_rows).sum())
        return float(nats / np.log(2) / self._held_bytes)


@dataclass(frozen=True)
class Bridge:
    """The way from one peer's tokens to another's; tables and matches are made once.

    Attributes:
        cache: folder where vocabulary tables are kept; None: nowhere.
    """

    source: Peer
    base: Peer
    align: Align = dtw
    cache: Path | None = None

    @cached_property
    def table(self) -> npt.NDArray[np.int32]:
        """The base token for every source token."""
        if self.cache is None:
            return mined_table(self.source.words, self.base.words)
        return cached_table(self.source.words, self.base.words, self.cache)

    @cached_property
    def match(self) -> I64:
        """The source place of every base place; the texts stay, so it is found once."""
        return self.align(self.base.places, self.base.words, self.source.places, self.source.words)

    def carry(self, said: LogitTable) -> Targets:
        """What the source said, in the base's tokens."""
        return carry(self.base.places, said, self.table, self.match)


def combined(tables: Sequence[LogitTable], chosen: I64) -> LogitTable:
    """One table of the same places: text i as `tables[chosen[i]]` says it; NONE as the first."""
    places = tables[0].places
    which = np.maximum(chosen, 0)[places.owner()]  # (places,)
    at = np.arange(len(which))
    return LogitTable(
        places,
        np.stack([table.truth for table in tables])[which, at],
        np.stack([table.ids for table in tables])[which, at],
        np.stack([table.logps for table in tables])[which, at],
    )


def joined_targets(base: Places, parts: Sequence[tuple[npt.NDArray[np.bool_], Targets]]) -> Targets:
    """Targets of the same places: each part gives those of the texts it names; others are empty."""
    kept = max((part.ids.shape[1] for _, part in parts), default=1)
    n = len(base.tokens)
    ids, mass = np.zeros((n, kept), np.int64), np.zeros((n, kept), np.float32)
    owner = base.owner()
    for texts, part in parts:
        at = texts[owner]
        ids[at, : part.ids.shape[1]] = part.ids[at]
        mass[at, : part.mass.shape[1]] = part.mass[at]
    return Targets(base, ids, mass)


def shuffled(targets: Targets, chosen: npt.NDArray[np.bool_], rng: np.random.Generator) -> Targets:
    """The same rows on the chosen texts, dealt to other places: the ablation of the teachers."""
    at = np.flatnonzero(chosen[targets.places.owner()])
    order = rng.permutation(at)
    ids, mass = targets.ids.copy(), targets.mass.copy()
    ids[at], mass[at] = targets.ids[order], targets.mass[order]
    return Targets(targets.places, ids, mass)


def fitted(pairs: Pairs, readers: Sequence[TaskReader], *, whole: bool) -> list[tuple[str, str]]:
    """The texts, with `whole` cut at their ends until every reader can hold them with the label.

    Raises:
        ConfigError: the label alone does not fit.
    """
    if not whole:
        return list(pairs)
    return [(_fit(text, label, readers), label) for text, label in pairs]


def _fit(text: str, label: str, readers: Sequence[TaskReader]) -> str:
    while True:
        over = max(_tokens(reader, text, label) - reader.max_tokens for reader in readers)
        if over <= 0:
            return text
        if not text:
            raise ConfigError(f"the task's prompt leaves no room for label {label!r}; shorten it")
        text = text[: max(0, len(text) - max(1, over))]  # a token is at least a byte, seldom less


def _tokens(reader: TaskReader, text: str, label: str) -> int:
    before = reader.task.prompt.split("{text}", 1)[0].rstrip() or "\n"
    encode = reader.tokenizer.encode
    frame = encode(before, add_special_tokens=False).ids
    return len(frame) + len(encode(whole_target(reader, text, label), add_special_tokens=False).ids)
