"""A text task for an encoder with a classifier, in the words the trainer knows: tokens and labels.

Knows how an encoder's classifier is asked as if it wrote its label as one more token. Does not know
batches, losses, codecs or devices.

The trainer, the twin and scoring predict a token after a prompt. Here token 0 is padding, tokens 1
to L are the task's labels, and the tokenizer's ids come after them; the model drops everything
below L + 1 from what it reads and gives L + 1 logits at every place. So no label is ever read, and
everything written for decoders serves as it is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from compression.errors import WeightsError
from compression.int4_torch import load_slm
from edge_sdk.encoders import columns_of
from edge_sdk.errors import ConfigError, RuntimeFailure
from edge_sdk.measure import Stopwatch
from edge_sdk.prompts import Tokens, load_tokenizer
from edge_sdk.sessions import is_encoder
from edge_sdk.train import lora
from edge_sdk.train.local import Means, quickest_dtype, train_locally
from edge_sdk.train.text_task import MAX_TOKENS, TaskReader
from edge_sdk.train.trainer import Gate, Labelled, Progress, Weighted, train_adapter
from edge_sdk.wire.messages import TextTask, TrainAdapter

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


def open_encoder(
    bundle: Path, task: TextTask, *, max_tokens: int = MAX_TOKENS, dtype: torch.dtype
) -> tuple[Any, EncoderReader]:
    """Return the bundle's model, ready for `lora.Adapter`, and the reader of its texts.

    Raises:
        RuntimeFailure: the bundle's weights cannot be trained on, or lack a label of the task.
        ConfigError: as `EncoderReader`, or the tokenizer cannot be read.
    """
    try:
        model = load_slm(bundle, dtype=dtype)
    except WeightsError as exc:
        raise RuntimeFailure(f"the bundle cannot be trained on: {exc}") from exc
    config = model.config
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise RuntimeFailure("the bundle cannot be trained on: its encoder has no classifier")
    columns = columns_of(task, [config.id2label[i] for i in range(config.num_labels)])
    context = int(getattr(config, "max_position_embeddings", max_tokens))
    reader = EncoderReader(task, load_tokenizer(bundle), max_tokens=min(max_tokens, context))
    return _speaking(model, columns), reader


def _speaking(model: Any, columns: list[int]) -> Any:
    """`model`, changed in place to answer like a language model whose words are the labels."""
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


def train_encoder_locally(
    order: TrainAdapter,
    bundle: Path,
    task: TextTask,
    examples: Sequence[Labelled],
    synthetic: Sequence[Weighted],
    *,
    means: Means,
    seed: int,
    watch: Stopwatch,
    progress: Progress | None = None,
    gate: Gate | None = None,
) -> lora.Factors:
    """As `train_locally`, for an encoder; `means` brings threads and tokens, and with a ceiling on
    memory the weights are held in 16 bits. A training that was cut off begins anew.

    Raises:
        RuntimeFailure: the bundle's weights cannot be trained on.
        Postponed: `gate` says not now.
        RemoteProtocolError: the order's adapter is not one of this model.
        ConfigError: the order's targets do not fit the model.
        DataError: no examples, or a label that is not of the task.
    """
    if means.threads:
        torch.set_num_threads(means.threads)
    torch.manual_seed(seed)
    with watch.stage("load"):
        dtype = torch.bfloat16 if means.memory_mb else quickest_dtype()
        model, reader = open_encoder(bundle, task, max_tokens=means.max_tokens, dtype=dtype)
        spec = lora.LoraSpec(rank=order.rank, alpha=order.alpha, targets=order.targets)
        adapter = lora.Adapter(model, spec)
        start = (
            lora.from_bytes(order.adapter)
            if order.adapter
            else lora.start_factors(adapter.layout, order.adapter_seed)
        )
        adapter.load(start)
    with watch.stage("train"):
        result = train_adapter(
            adapter,
            reader,
            examples,
            steps=order.steps,
            batch=order.batch,
            lr=order.lr,
            seed=seed,
            synthetic=synthetic,
            synthetic_weight=order.synthetic_weight,
            progress=progress,
            gate=gate,
        )
    return lora.delta(result.factors, start)


def trainer_for(bundle: Path) -> Callable[..., lora.Factors]:
    """`train_encoder_locally` or `train_locally`, by what the bundle holds."""
    return train_encoder_locally if is_encoder(bundle) else train_locally
