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
from compression.int4 import WEIGHTS_FILE
from compression.int4_torch import held_bytes
from edge_sdk.algorithms.logit_rows import LogitTable
from edge_sdk.algorithms.vocabulary import Vocabulary
from edge_sdk.errors import FleetError, RuntimeFailure, StorageError
from edge_sdk.measure import Stopwatch
from edge_sdk.train import lora, memory, teaching
from edge_sdk.train.checkpoint import Checkpoint, key_of
from edge_sdk.train.kinds import kind_of
from edge_sdk.train.text_task import TaskReader, padded_width
from edge_sdk.train.trainer import (
    Gate,
    Labelled,
    Progress,
    Weighted,
    train_adapter,
)
from edge_sdk.wire.messages import TextTask, TopLogits, TrainAdapter, encode


@dataclass(frozen=True, slots=True)
class Means:
    """What training may take: MiB (0: no limit), CPU threads (0: all), tokens per example; and
    where it stands is kept in `checkpoint` every `checkpoint_s` seconds (None: not kept)."""

    memory_mb: int = 0
    threads: int = 1
    max_tokens: int = 128
    checkpoint: Path | None = None
    checkpoint_s: float = 60.0


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
    gate: Gate | None = None,
) -> lora.Factors:
    """Return the change of the adapter's factors, {name: float32 (r, in) or (out, r)}.

    A call that was cut off, by a kill or by `gate`, goes on when it is made again with the same
    arguments and `means.checkpoint`, and ends with the same change bit for bit. An encoder's
    memory is not predicted: a ceiling on it only has the weights held in 16 bits.

    Raises:
        RuntimeFailure: the bundle's weights cannot be trained on, or not in so little memory, or
            it is an encoder that lacks a label of the task.
        Postponed: `gate` says not now.
        RemoteProtocolError: the order's adapter is not one of this model.
        ConfigError: the order's targets do not fit the model.
        DataError: no examples, or a label that is not of the task.
    """
    if means.threads:
        torch.set_num_threads(means.threads)
    torch.manual_seed(seed)
    with watch.stage("load"):
        spec = lora.LoraSpec(rank=order.rank, alpha=order.alpha, targets=order.targets)
        kind = kind_of(bundle)
        reader = kind.reader.from_folder(task, bundle, max_tokens=means.max_tokens)
        way = memory.Way()
        if means.memory_mb and examples and kind.writes:
            way = _way(order, spec, bundle, reader, examples, synthetic, means)
        dtype = torch.bfloat16 if means.memory_mb else quickest_dtype()
        adapter = lora.Adapter(kind.model(bundle, task, packed=way.packed, dtype=dtype), spec)
        if way.again:
            memory.compute_again(adapter.model)
        start = (
            lora.from_bytes(order.adapter)
            if order.adapter
            else lora.start_factors(adapter.layout, order.adapter_seed)
        )
        adapter.load(start)
        checkpoint = None
        if means.checkpoint is not None:
            key = key_of(
                encode(order),
                msgspec.json.encode([task, examples, synthetic, seed, means.max_tokens]),
                repr((way, dtype, torch.get_num_threads(), torch.__version__)).encode(),
                (bundle / WEIGHTS_FILE).read_bytes(),
            )
            checkpoint = Checkpoint(means.checkpoint, key, every_s=means.checkpoint_s)
    try:
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
                rows=way.rows,
                checkpoint=checkpoint,
                gate=gate,
            )
    except StorageError:  # put off, to go on later
        raise
    except FleetError:
        _forget(checkpoint)
        raise
    _forget(checkpoint)
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
        RuntimeFailure: the bundle's weights cannot be trained on, or it is an encoder.
        DataError: a label of no task, or a whole text that is too long.
    """
    kind = kind_of(bundle)
    if not kind.writes:
        raise RuntimeFailure(
            f"release {task.release} is an encoder, which says nothing of next tokens; ask Score"
        )
    if means.threads:
        torch.set_num_threads(means.threads)
    with watch.stage("load"):
        spec = lora.LoraSpec(rank=own.rank, alpha=own.alpha, targets=own.targets)
        dtype = torch.bfloat16 if means.memory_mb else quickest_dtype()
        packed = means.memory_mb > 0 and not _plain_fits(bundle, means, dtype)
        model = kind.model(bundle, text_task, packed=packed, dtype=dtype)
        adapter = lora.Adapter(model, spec)
        adapter.load(lora.from_bytes(own.adapter))
        reader = kind.reader.from_folder(text_task, bundle, max_tokens=means.max_tokens)
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


def _plain_fits(bundle: Path, means: Means, dtype: torch.dtype) -> bool:
    # Without a backward pass activations are few; half of the ceiling is theirs.
    try:
        return 2 * held_bytes(bundle, packed=False, dtype=dtype) <= means.memory_mb * 2**20
    except WeightsError as exc:
        raise RuntimeFailure(f"the bundle cannot be trained on: {exc}") from exc


def _way(
    order: TrainAdapter,
    spec: lora.LoraSpec,
    bundle: Path,
    reader: TaskReader,
    examples: Sequence[Labelled],
    synthetic: Sequence[Weighted],
    means: Means,
) -> memory.Way:
    given = synthetic if order.synthetic_weight > 0 else []
    pairs = [*examples, *((text, label) for text, label, _ in given)]
    seen = reader.labelled([text for text, _ in pairs], [label for _, label in pairs])
    answers = max(len(ids) - start for ids, start in zip(seen.ids, seen.starts, strict=True))
    tokens = padded_width(seen.ids)
    rows = min(order.batch, len(examples)) + min(max(1, order.batch // 2), len(given))
    try:
        needs = memory.needs_of(bundle, spec, tokens=tokens)
    except WeightsError as exc:
        raise RuntimeFailure(f"the bundle cannot be trained on: {exc}") from exc
    return memory.quickest(needs, memory_mb=means.memory_mb, rows=rows, answers=answers)


def _forget(checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        checkpoint.remove()
