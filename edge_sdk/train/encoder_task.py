"""A text task for an encoder with a classifier, in the words the trainer knows: tokens and labels.

Knows how an encoder's classifier is asked as if it wrote its label as one more token. Does not know
batches, losses, codecs or devices.

The trainer, the twin and scoring predict a token after a prompt. Here token 0 is padding, tokens 1
to L are the task's labels, and the tokenizer's ids come after them; the model drops everything
below L + 1 from what it reads and gives L + 1 logits at every place. So no label is ever read, and
everything written for decoders serves as it is.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from edge_sdk.errors import ConfigError, RuntimeFailure
from edge_sdk.labels import columns_of
from edge_sdk.prompts import Tokens
from edge_sdk.train.text_task import TaskReader
from edge_sdk.wire.messages import TextTask

NEVER = -1e4
"""Logit of padding, which is no label."""


class EncoderReader(TaskReader):
    """The texts of a task as an encoder reads them: as they are, no prompt around them.

    Raises:
        ConfigError: no labels, or fewer tokens than any text needs.
    """

    def __init__(self, task: TextTask, tokenizer: Any, *, max_tokens: int) -> None:
        if not task.labels or len(set(task.labels)) != len(task.labels) or max_tokens < 3:
            raise ConfigError(
                f"task {task.name}: needs labels that differ, and 3 tokens or more ({max_tokens})"
            )
        self.task, self.tokenizer, self.max_tokens = task, tokenizer, max_tokens
        self.words = [[1 + i] for i in range(len(task.labels))]
        self.one_token_decides = True
        self._index = {label: i for i, label in enumerate(task.labels)}
        tokenizer.enable_truncation(max_tokens)

    def prompts(self, texts: Sequence[str]) -> list[Tokens]:
        """Return each text's tokens, moved up by the number of labels and one."""
        first = len(self.words) + 1
        return [[first + i for i in row.ids] for row in self.tokenizer.encode_batch(list(texts))]


def speaking(model: Any, task: TextTask) -> Any:
    """Return `model`, changed in place to answer like a language model whose words are the labels.

    Raises:
        RuntimeFailure: it has no classifier, or that lacks a label of the task.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise RuntimeFailure("the bundle cannot be trained on: its encoder has no classifier")
    config = model.config
    columns = columns_of(task, [config.id2label[i] for i in range(config.num_labels)])
    place, classify, first = nn.Identity(), model.forward, len(columns) + 1

    def forward(input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        mask = (input_ids >= first).long()  # (B, T)
        found = classify(input_ids=(input_ids - first) * mask, attention_mask=mask)
        logits = found.logits[:, columns]  # (B, labels)
        words = torch.cat([torch.full_like(logits[:, :1], NEVER), logits], dim=1)
        return SimpleNamespace(logits=place(words[:, None].expand(-1, input_ids.shape[1], -1)))

    # On this very object, so that its layers keep the names they have in the bundle.
    model.forward = forward
    model.get_output_embeddings = lambda: place
    return model
