"""The two kinds of bundle as the trainer opens them: one that writes, one that only labels.

Knows which reader and which model a kind needs. Does not know LoRA, batches or losses: to the
trainer both are models that give the task's words probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compression.errors import WeightsError
from compression.int4_torch import load_slm
from edge_sdk.errors import RuntimeFailure
from edge_sdk.sessions import is_encoder
from edge_sdk.train.encoder_task import EncoderReader, speaking
from edge_sdk.train.text_task import MAX_TOKENS, TaskReader
from edge_sdk.wire.messages import TextTask


@dataclass(frozen=True, slots=True)
class TrainingKind:
    """How the bundles of one kind are opened for training.

    Attributes:
        reader: makes token rows of a task's texts.
        speaking: makes a loaded model answer in the words of the task; it may change it in place.
        writes: whether it says what token comes next, as TopLogits and the prediction of memory
            need; an encoder does not.
    """

    reader: type[TaskReader]
    speaking: Callable[[Any, TextTask], Any]
    writes: bool

    def model(
        self, bundle: Path, task: TextTask, *, dtype: torch.dtype, packed: bool = False
    ) -> Any:
        """Return the bundle's model, frozen, ready for `lora.Adapter`.

        Raises:
            RuntimeFailure: its weights cannot be trained on, or it lacks a label of the task.
        """
        try:
            return self.speaking(load_slm(bundle, packed=packed, dtype=dtype), task)
        except WeightsError as exc:
            raise RuntimeFailure(f"the bundle cannot be trained on: {exc}") from exc


DECODER = TrainingKind(TaskReader, lambda model, _task: model, writes=True)
ENCODER = TrainingKind(EncoderReader, speaking, writes=False)


def kind_of(bundle: Path) -> TrainingKind:
    """Return the kind of the bundle in that folder."""
    return ENCODER if is_encoder(bundle) else DECODER


def opened(
    bundle: Path, task: TextTask, *, dtype: torch.dtype, max_tokens: int = MAX_TOKENS
) -> tuple[Any, TaskReader]:
    """Return the bundle's model, whichever kind it is, and the reader of the task's texts.

    Raises:
        RuntimeFailure: as `TrainingKind.model`.
        ConfigError: the task does not fit the tokenizer, or that cannot be read.
    """
    kind = kind_of(bundle)
    reader = kind.reader.from_folder(task, bundle, max_tokens=max_tokens)
    return kind.model(bundle, task, dtype=dtype), reader
