"""Labels from a decoder: how likely is each label's word as the text's continuation?

Knows prompts and logits. Does not know where logits come from.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edge_sdk.errors import FleetError, RuntimeFailure
from edge_sdk.labels import F32, LabelAnswers, log_softmax, softmax
from edge_sdk.prompts import TaskPrompts, Tokens, batches
from edge_sdk.wire.messages import TextTask

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_TOKENS = 1024
"""Padded tokens read at once; their attention cache and logits are held in memory."""


class WordLabels(LabelAnswers):
    """Label probabilities over `_next_logits`, which a session brings."""

    def __init__(
        self,
        task: TextTask | None,
        tokenizer: "Tokenizer",
        *,
        context: int,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        """`batch_tokens`: padded tokens of prompts that are read at once, or one prompt."""
        self.task, self.context, self._batch_tokens = task, context, batch_tokens
        self._tokenizer = tokenizer
        self._prompts: dict[TextTask, TaskPrompts] = {}

    @abstractmethod
    def _next_logits(self, rows: Sequence[Tokens]) -> F32:
        """Logits after each row, (B, vocab) float32."""

    def label_probabilities(self, texts: Sequence[str], task: TextTask | None = None) -> F32:
        """Return each label's probability for each text, (n, labels) float32, rows sum to 1.

        A text too long for the context is cut at its end.

        Raises:
            RuntimeFailure: no task, or an empty text.
        """
        prompts = self._task_prompts(self._chosen(task))
        if any(not text.strip() for text in texts):
            raise RuntimeFailure("a text to classify is empty")
        rows = prompts.prompts(texts)
        found = np.zeros((len(rows), len(prompts.words)), np.float32)
        for batch in batches(rows, tokens=self._batch_tokens):
            scores = self._word_log_probs([rows[i] for i in batch], prompts)  # (B, labels)
            found[batch] = softmax(scores)
        return found

    def _word_log_probs(self, rows: list[Tokens], prompts: TaskPrompts) -> F32:
        """Log-probability of every label's word after each prompt, (B, labels)."""
        if prompts.one_token_decides:
            firsts = [word[0] for word in prompts.words]
            return log_softmax(self._next_logits(rows))[:, firsts]
        scores = np.zeros((len(rows), len(prompts.words)), np.float32)
        for i, row in enumerate(rows):
            for j, word in enumerate(prompts.words):
                starts = [row + word[:t] for t in range(len(word))]
                logs = log_softmax(self._next_logits(starts))  # (len(word), vocab)
                scores[i, j] = logs[np.arange(len(word)), word].sum()
        return scores

    def _task_prompts(self, task: TextTask) -> TaskPrompts:
        if task not in self._prompts:
            try:
                self._prompts[task] = TaskPrompts(task, self._tokenizer, max_tokens=self.context)
            except FleetError as exc:
                raise RuntimeFailure(str(exc)) from exc
        return self._prompts[task]
