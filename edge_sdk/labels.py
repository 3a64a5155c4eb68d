"""Labels for texts out of a model's probabilities, for every kind of session.

Knows tasks and numpy. Does not know how a model comes to its probabilities.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import DataError, RuntimeFailure
from edge_sdk.wire.messages import TextTask

F32 = npt.NDArray[np.float32]


class LabelAnswers(ABC):
    """What follows once a session can say how probable each label is.

    Attributes:
        task: the labelled-text task the model was made for, if any.
    """

    task: TextTask | None

    @abstractmethod
    def label_probabilities(self, texts: Sequence[str], task: TextTask | None = None) -> F32:
        """Return each label's probability for each text, (n, labels) float32, rows sum to 1."""

    def classify(self, text: str, task: TextTask | None = None) -> str:
        """Return the label of `task` (default: the bundle's) that fits `text` best.

        Raises:
            RuntimeFailure: no task, or an empty text.
        """
        return self.classify_many([text], task)[0]

    def classify_many(self, texts: Sequence[str], task: TextTask | None = None) -> list[str]:
        """Return the best label of each text, in order.

        Raises:
            RuntimeFailure: no task, or an empty text.
        """
        labels = self._chosen(task).labels
        best = self.label_probabilities(texts, task).argmax(axis=1)
        return [labels[i] for i in best]

    def score(
        self, texts: Sequence[str], labels: Sequence[str], task: TextTask | None = None
    ) -> F32:
        """Return the probability of `labels[i]` for `texts[i]`, (n,) float32 in [0, 1].

        Raises:
            RuntimeFailure: no task, or an empty text.
            DataError: a label that is not of the task.
        """
        chosen = self._chosen(task)
        columns = [_column(chosen, label) for label in labels]
        if len(columns) != len(texts):
            raise RuntimeFailure(f"{len(texts)} texts came with {len(columns)} labels")
        probabilities = self.label_probabilities(texts, task)
        return probabilities[np.arange(len(texts)), columns]

    def _chosen(self, task: TextTask | None) -> TextTask:
        chosen = task or self.task
        if chosen is None:
            raise RuntimeFailure("this bundle was made for no task; pass one with task=")
        return chosen


def accuracy(session: LabelAnswers, texts: Sequence[str], labels: Sequence[str]) -> float:
    """Return the share of texts that `session` labels right; 0.0 of no texts."""
    if not texts:
        return 0.0
    found = session.classify_many(texts)
    return sum(a == b for a, b in zip(found, labels, strict=True)) / len(texts)


def softmax(scores: F32) -> F32:
    """Return the shares of `scores` over the last axis, float32."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: F32 = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def log_softmax(logits: F32) -> F32:
    """Return the logarithms of the shares of `logits` over the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs: F32 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def columns_of(task: TextTask, labels: Sequence[str]) -> list[int]:
    """Return where a classifier with `labels` has the task's: by name, or by order if its own are
    plain numbers ("LABEL_0").

    Raises:
        RuntimeFailure: it lacks a label of the task.
    """
    plain = [f"LABEL_{i}" for i in range(len(task.labels))]
    known = list(task.labels) if list(labels) == plain else list(labels)
    lacking = sorted(set(task.labels) - set(known))
    if lacking:
        raise RuntimeFailure(
            f"the model has no label {lacking[0]!r} of task {task.name}; it has {', '.join(labels)}"
        )
    return [known.index(label) for label in task.labels]


def _column(task: TextTask, label: str) -> int:
    if label not in task.labels:
        raise DataError(
            f"label {label!r} is not of task {task.name}; its labels are {', '.join(task.labels)}"
        )
    return task.labels.index(label)
