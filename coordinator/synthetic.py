"""S, the synthetic texts: which are kept, how they are stored and sent, and the labels asked for.

Knows texts, labels and scores. Does not know who writes, who judges, or rounds.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from coordinator.diversity import fingerprint, names_label, repetitions
from coordinator.llm import Written
from edge_sdk.train.text_task import Sequences
from edge_sdk.wire.messages import OfferData, TextTask

F32 = npt.NDArray[np.float32]

MIN_WORDS = 3
"""A generated request of fewer words says nothing that a label could be told from."""


@dataclass(slots=True)
class Pool:
    """S: synthetic texts, their labels and scores."""

    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, texts: Sequence[str], labels: Sequence[str], scores: Sequence[float]) -> None:
        """Take in more; a text already held keeps its place."""
        held = {fingerprint(text) for text in self.texts}
        for text, label, score in zip(texts, labels, scores, strict=True):
            if fingerprint(text) not in held:
                held.add(fingerprint(text))
                self.texts.append(text)
                self.labels.append(label)
                self.scores.append(float(score))

    def trim(self, size: int) -> None:
        """Keep the `size` best-scored."""
        order = sorted(range(len(self.texts)), key=lambda i: (-self.scores[i], self.texts[i]))
        keep = sorted(order[:size])
        self.texts = [self.texts[i] for i in keep]
        self.labels = [self.labels[i] for i in keep]
        self.scores = [self.scores[i] for i in keep]

    def offer(self, version: int) -> OfferData:
        """The message that brings S to a device."""
        return OfferData(
            task_id=f"data-{version}",
            version=version,
            texts=tuple(self.texts),
            labels=tuple(self.labels),
            weights=tuple(min(1.0, max(0.0, score)) for score in self.scores),
        )

    def to_bytes(self) -> bytes:
        """S as JSON, for a program's state."""
        return json.dumps(
            {"texts": self.texts, "labels": self.labels, "scores": self.scores}
        ).encode()

    def restore(self, data: bytes) -> Self:
        """Take up what `to_bytes` returned."""
        held = json.loads(data)
        self.texts, self.labels, self.scores = held["texts"], held["labels"], held["scores"]
        return self


def uniform_labels(task: TextTask, n: int, rng: np.random.Generator) -> list[str]:
    """y_i ~ U(labels), with every label as often as any other (give or take one), shuffled."""
    order = [task.labels[i % len(task.labels)] for i in range(n)]
    return [order[i] for i in rng.permutation(n)]


def shuffled_labels(written: Written, rng: np.random.Generator) -> Written:
    """The same texts and the same labels, paired at random."""
    order = rng.permutation(len(written.labels)).tolist()
    return replace(written, labels=[written.labels[i] for i in order])


def joined(parts: Sequence[Written]) -> Written:
    """Several writings as one, in order."""
    return Written(
        [text for part in parts for text in part.texts],
        [label for part in parts for label in part.labels],
        Sequences(
            [row for part in parts for row in part.sequences.ids],
            [start for part in parts for start in part.sequences.starts],
        ),
    )


def worth_keeping(
    task: TextTask,
    written: Written,
    scores: F32,
    tau: float,
    *,
    held: Sequence[str] = (),
    near_too: bool = True,
) -> list[int]:
    """Rows of `written` fit for S: scored at least tau, MIN_WORDS long, not a repetition of another
    or of those `held`, nor (with `near_too`) nearly one, and not naming the label they were asked
    for: such a text is judged by its label word alone."""
    words = dict(zip(task.labels, task.words, strict=True))
    rows = [
        i
        for i, (text, label) in enumerate(zip(written.texts, written.labels, strict=True))
        if scores[i] >= tau
        and len(re.findall(r"\w+", text)) >= MIN_WORDS
        and not names_label(text, words[label])
    ]
    found = repetitions([*held, *[written.texts[i] for i in rows]])[len(held) :]
    drop = {"same", "near"} if near_too else {"same"}
    return [i for i, kind in zip(rows, found, strict=True) if kind not in drop]
