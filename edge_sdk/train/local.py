"""One TrainAdapter task carried out here: the bundle's weights, this device's examples, a change.

Knows the order of the steps and which of them need torch. Does not know messages' replies, codecs,
storage or the network; examples come in as plain pairs and only factors go out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from compression.errors import WeightsError
from compression.int4_torch import load_slm
from edge_sdk.algorithms.logit_rows import LogitTable
from edge_sdk.algorithms.vocabulary import Vocabulary
from edge_sdk.errors import RuntimeFailure
from edge_sdk.measure import Stopwatch
from edge_sdk.train import lora, teaching
from edge_sdk.train.text_task import TaskReader
from edge_sdk.train.trainer import Labelled, Progress, Weighted, train_adapter
from edge_sdk.wire.messages import TextTask, TopLogits, TrainAdapter


@dataclass(frozen=True, slots=True)
class Means:
    """What training may take: MiB (0: no limit), CPU threads (0: all), tokens per example."""

    memory_mb: int = 0
    threads: int = 1
    max_tokens: int = 128


def train_locally(
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
) -> lora.Factors:
    """Return the change of the adapter's factors, {name: float32 (r, in) or (out, r)}.

    Raises:
        RuntimeFailure: the bundle's weights cannot be trained on.
        RemoteProtocolError: the order's adapter is not one of this model.
        ConfigError: the order's targets do not fit the model.
        DataError: no examples, or a label that is not of the task.
    """
    if means.threads:
        torch.set_num_threads(means.threads)
    torch.manual_seed(seed)
    with watch.stage("load"):
        spec = lora.LoraSpec(rank=order.rank, alpha=order.alpha, targets=order.targets)
        adapter = lora.Adapter(_model(bundle, means), spec)
        reader = TaskReader.from_folder(task, bundle, max_tokens=means.max_tokens)
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
        )
    return lora.delta(result.factors, start)


def with_change(order: TrainAdapter, change: lora.Factors) -> TrainAdapter:
    """The order as a record of what came of it: its adapter is the trained one, its codec empty.

    Raises:
        RemoteProtocolError: a trained value is beyond float16.
    """
    layout = lora.layout_of(change)
    start = (
        lora.from_bytes(order.adapter)
        if order.adapter
        else lora.start_factors(layout, order.adapter_seed)
    )
    trained = lora.to_bytes(lora.add(start, change))
    return msgspec.structs.replace(order, adapter=trained, codec=b"")


def rows_locally(
    own: TrainAdapter,
    task: TopLogits,
    bundle: Path,
    text_task: TextTask,
    *,
    means: Means,
    watch: Stopwatch,
) -> tuple[LogitTable, int]:
    """What the trained adapter recorded in `own` says of the task's texts, and the vocabulary size.

    Raises:
        RuntimeFailure: the bundle's weights cannot be trained on.
        DataError: a label of no task, or a whole text that is too long.
    """
    if means.threads:
        torch.set_num_threads(means.threads)
    with watch.stage("load"):
        spec = lora.LoraSpec(rank=own.rank, alpha=own.alpha, targets=own.targets)
        adapter = lora.Adapter(_model(bundle, means), spec)
        adapter.load(lora.from_bytes(own.adapter))
        reader = TaskReader.from_folder(text_task, bundle, max_tokens=means.max_tokens)
    pairs = list(zip(task.texts, task.labels, strict=True))
    rows = teaching.lesson_texts(reader, pairs, whole=task.whole)
    vocabulary = len(Vocabulary.of(reader.tokenizer))
    with watch.stage("logits"):
        table = teaching.logit_table(adapter.model, rows, kept=task.kept, vocabulary=vocabulary)
    return table, vocabulary


def quickest_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it, else float32."""
    # A 3 M model's step takes 0.12 s in 16 bits and 0.17 s in 32 on an AMD EPYC with AVX512-BF16;
    # without such instructions 16 bits are emulated and several times slower.
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    found = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if found else torch.float32


def _model(bundle: Path, means: Means) -> object:
    dtype = torch.bfloat16 if means.memory_mb else quickest_dtype()
    try:
        return load_slm(bundle, packed=means.memory_mb > 0, dtype=dtype)
    except WeightsError as exc:
        raise RuntimeFailure(f"the bundle cannot be trained on: {exc}") from exc
