"""One TeachAdapter task carried out here: the LLM's rows aligned, chosen from, and learned.

Knows the order of FedMKT's lines 8 and 9 on a device. Does not know messages' replies, codecs or
storage. What this device finds likely of the public texts, and so which of them it was taught,
stays here: only the change of the adapter goes out.
"""

from pathlib import Path

import numpy as np
import torch

from compression.errors import WeightsError
from compression.int4 import WEIGHTS_FILE
from edge_sdk.algorithms.alignment import Targets, carry, dtw, greedy
from edge_sdk.algorithms.logit_rows import LogitTable, Places, unpack
from edge_sdk.algorithms.selection import surer
from edge_sdk.algorithms.vocabulary import Vocabulary, cached_table
from edge_sdk.errors import FleetError, RemoteProtocolError, RuntimeFailure, StorageError
from edge_sdk.measure import Stopwatch
from edge_sdk.train import lora, memory
from edge_sdk.train.checkpoint import Checkpoint, key_of
from edge_sdk.train.kinds import kind_of
from edge_sdk.train.local import Means, quickest_dtype
from edge_sdk.train.teaching import (
    Lesson,
    Pairs,
    lesson_texts,
    places_of,
    target_bytes,
    target_losses,
    teach,
)
from edge_sdk.train.text_task import Sequences, TaskReader, padded_width
from edge_sdk.train.trainer import Gate, Progress
from edge_sdk.wire.messages import TeachAdapter, TextTask, encode

MOST_TABLES = 4
"""Vocabulary tables kept on this device's disk; each takes four bytes a token of the LLM's."""


def learn_locally(
    task: TeachAdapter,
    words: Vocabulary,
    bundle: Path,
    text_task: TextTask,
    *,
    means: Means,
    seed: int,
    cache: Path,
    watch: Stopwatch,
    progress: Progress | None = None,
    gate: Gate | None = None,
) -> lora.Factors:
    """Return the change of the adapter's factors, {name: float32 (r, in) or (out, r)}.

    `words` is the LLM's vocabulary; the table from it to this model's is kept in the folder
    `cache`. A call that was cut off goes on, as `train_locally` does.

    Raises:
        RuntimeFailure: an encoder, weights that cannot be trained on, or too little memory.
        Postponed: `gate` says not now.
        RemoteProtocolError: the LLM's rows cannot be, or the adapter is not one of this model.
        ConfigError: the targets do not fit the model.
        DataError: a label that is not of the task, or a whole text that is too long.

    Source: FedMKT (arXiv 2406.02224) algorithm 1, the client's half; PAPERS.md 2 (b), steps 7, 8.
    """
    said = rows_of(task, words)
    kind = kind_of(bundle)
    if not kind.writes:
        raise RuntimeFailure(f"release {task.release} is an encoder, which learns no next tokens")
    if means.threads:
        torch.set_num_threads(means.threads)
    torch.manual_seed(seed)
    pairs = list(zip(task.texts, task.labels, strict=True))
    with watch.stage("load"):
        reader = kind.reader.from_folder(text_task, bundle, max_tokens=means.max_tokens)
        rows = lesson_texts(reader, pairs, whole=task.whole)
        spec = lora.LoraSpec(rank=task.rank, alpha=task.alpha, targets=task.targets)
        way = _way(bundle, spec, rows, task.batch, means)
        dtype = torch.bfloat16 if means.memory_mb else quickest_dtype()
        model = kind.model(bundle, text_task, packed=way.packed, dtype=dtype)
        adapter = lora.Adapter(model, spec)
        start = lora.from_bytes(task.adapter)
        adapter.load(start)
    with watch.stage("align"):
        targets = aligned(said, words, rows, reader, cache, by_bytes=task.greedy)
        chosen = chosen_texts(adapter, said, rows, reader, pairs, whole=task.whole)
    if way.again:
        memory.compute_again(adapter.model)
    checkpoint = None
    if means.checkpoint is not None:
        how = repr((way, dtype, torch.get_num_threads(), torch.__version__, means.max_tokens))
        key = key_of(encode(task), how.encode(), str(seed).encode(), _weights(bundle))
        checkpoint = Checkpoint(means.checkpoint, key, every_s=means.checkpoint_s)
    try:
        with watch.stage("train"):
            teach(
                adapter,
                rows,
                targets,
                chosen,
                Lesson(task.share, task.steps, task.batch, task.lr),
                seed=seed,
                progress=progress,
                at_once=way.rows,
                checkpoint=checkpoint,
                gate=gate,
            )
    except StorageError:  # put off, to go on later
        raise
    except FleetError:
        if checkpoint is not None:
            checkpoint.remove()
        raise
    if checkpoint is not None:
        checkpoint.remove()
    return lora.delta(adapter.factors(), start)


def rows_of(task: TeachAdapter, words: Vocabulary) -> LogitTable:
    """The LLM's rows that came with the task, checked.

    Raises:
        RemoteProtocolError: of other numbers of texts or places, or no model can have given them.
    """
    if len(task.tokens) % 4 or len(task.lengths) != 4 * len(task.texts):
        raise RemoteProtocolError(f"the task's rows are not about its {len(task.texts)} texts")
    tokens, lengths = (np.frombuffer(data, "<i4") for data in (task.tokens, task.lengths))
    if (lengths < 0).any() or lengths.sum(dtype=np.int64) != len(tokens):
        raise RemoteProtocolError(f"the task's lengths do not add up to its {len(tokens)} tokens")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(words):
        raise RemoteProtocolError(f"a token is outside the vocabulary of {len(words)}")
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    places = Places(tokens.astype(np.int32), starts)
    return unpack(places, task.kept, len(words), task.truth, task.ids, task.logps)


def aligned(
    said: LogitTable,
    words: Vocabulary,
    rows: Sequences,
    reader: TaskReader,
    cache: Path,
    *,
    by_bytes: bool,
) -> Targets:
    """Line 8: the LLM's rows in this model's tokens (MinED, then warping or equal beginnings).

    Raises:
        RuntimeFailure: rapidfuzz, of the train extra, is absent.
    """
    mine, places = Vocabulary.of(reader.tokenizer), places_of(rows)
    try:
        table = cached_table(words, mine, cache)
        match = (greedy if by_bytes else dtw)(places, mine, said.places, words)
    except ImportError as exc:
        raise RuntimeFailure("alignment needs the train extra's rapidfuzz, absent here") from exc
    _keep_newest(cache)
    return carry(places, said, table, match)


def chosen_texts(
    adapter: lora.Adapter,
    said: LogitTable,
    rows: Sequences,
    reader: TaskReader,
    pairs: Pairs,
    *,
    whole: bool,
) -> "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]":
    """Line 8, DualMinCE: the texts that the LLM knows better than the adapter does, (texts,)."""
    own = target_losses(adapter.model, rows)
    return surer(own, said.losses(), target_bytes(reader, pairs, whole=whole))


def _keep_newest(cache: Path) -> None:
    found = sorted(cache.glob("mined-*.npy"), key=lambda path: path.stat().st_mtime)
    for path in found[:-MOST_TABLES]:
        path.unlink(missing_ok=True)


def _way(
    bundle: Path, spec: lora.LoraSpec, rows: Sequences, batch: int, means: Means
) -> memory.Way:
    if not means.memory_mb or not len(rows):
        return memory.Way()
    answers = max(len(ids) - start for ids, start in zip(rows.ids, rows.starts, strict=True))
    tokens = padded_width(rows.ids)
    try:
        needs = memory.needs_of(bundle, spec, tokens=tokens)
    except WeightsError as exc:
        raise RuntimeFailure(f"the bundle cannot be trained on: {exc}") from exc
    at_once = min(batch, len(rows))
    return memory.quickest(needs, memory_mb=means.memory_mb, rows=at_once, answers=answers)


def _weights(bundle: Path) -> bytes:
    return (bundle / WEIGHTS_FILE).read_bytes()
