"""What a model says of public texts, and how it learns what another one said of them.

Knows token rows, sparse rows and the loss on them. Does not know whose rows they are, alignment,
messages or files.

A target never becomes a row of the vocabulary. One log-softmax, which plain cross-entropy needs
too, is read at k + 1 places a row, so a step costs what a step of plain cross-entropy costs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_sdk.algorithms.alignment import Targets
from edge_sdk.algorithms.logit_rows import LogitTable, Places
from edge_sdk.errors import DataError
from edge_sdk.prompts import batches
from edge_sdk.train.checkpoint import Checkpoint
from edge_sdk.train.lora import Adapter
from edge_sdk.train.text_task import Sequences, TaskReader, logits_at, padded
from edge_sdk.train.trainer import Gate, Progress, optimize, shuffled_batches

Pairs = Sequence[tuple[str, str]]
"""Public texts with their labels."""

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

MOST_LOGITS = 1 << 24
"""Logits held at once when rows are made: 64 MiB, however large the vocabulary."""
LEAST_TAIL = 1e-6
"""Mass left to all other tokens counts as at least this, or its logarithm would be infinite."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """How a model is taught: lambda of PAPERS.md 2 (the weight of the labels), and the optimizer.

    Attributes:
        share: lambda, in [0, 1]; 1 leaves the teachers out.
        steps, batch, lr: optimizer steps, texts a step, learning rate.
    """

    share: float = 0.9
    steps: int = 30
    batch: int = 8
    lr: float = 2e-3


def lesson_texts(reader: TaskReader, pairs: Pairs, *, whole: bool) -> Sequences:
    """Public texts as tokens: the label's word is to be predicted, or with `whole` the text too.

    Raises:
        DataError: a label is not of the task, or a whole text has too many tokens.
    """
    if not whole:
        return reader.labelled([text for text, _ in pairs], [label for _, label in pairs])
    before = reader.task.prompt.split("{text}", 1)[0].rstrip() or "\n"
    frame = list(reader.tokenizer.encode(before, add_special_tokens=False).ids)
    targets = [whole_target(reader, text, label) for text, label in pairs]
    rows = reader.tokenizer.encode_batch(targets, add_special_tokens=False)
    ids = [[*frame, *row.ids] for row in rows]
    longest = max(map(len, ids), default=0)
    if longest > reader.max_tokens:
        raise DataError(
            f"a public text has {longest} tokens, {reader.max_tokens} fit; cut it before"
        )
    return Sequences(ids, [len(frame)] * len(ids))


def whole_target(reader: TaskReader, text: str, label: str) -> str:
    """What is to be predicted of a whole text: itself, what asks for the label, and the word."""
    after = reader.task.prompt.split("{text}", 1)[1]
    return f" {text}{after}{reader.task.words[reader.label_index(label)]}"


def target_bytes(reader: TaskReader, pairs: Pairs, *, whole: bool) -> I64:
    """UTF-8 bytes of what is to be predicted of each text, (texts,); the same for every model."""
    said = [
        whole_target(reader, text, label) if whole else reader.task.words[reader.label_index(label)]
        for text, label in pairs
    ]
    return np.array([len(text.encode()) for text in said], np.int64)


def places_of(rows: Sequences) -> Places:
    """The tokens of `rows` that are to be predicted."""
    return Places.of(rows.ids, rows.starts)


def logit_table(model: Any, rows: Sequences, *, kept: int, vocabulary: int) -> LogitTable:
    """What `model` finds likeliest at every place of `rows`; no gradient.

    `vocabulary` is the tokenizer's size; ids that a model has beyond it are never among the kept.

    Source: FedMKT (arXiv 2406.02224) section 3.2, the pair (l, p) of every public text.
    """
    places = places_of(rows)
    n = len(places.tokens)
    k = min(kept, vocabulary)
    truth = np.zeros(n, np.float32)
    ids, logps = np.zeros((n, k), np.int32), np.zeros((n, k), np.float16)
    for group, where in _batches(model, rows, places):
        with torch.inference_mode():
            log_p = torch.log_softmax(_logits(model, rows.pick(group)), dim=-1)  # (places, V)
            best, chosen = log_p[:, :vocabulary].topk(k, dim=-1)
            wanted = torch.from_numpy(places.tokens[where].astype(np.int64))
            truth[where] = log_p.gather(1, wanted[:, None])[:, 0].clamp(max=0).numpy()
            ids[where] = chosen.numpy()
            logps[where] = best.clamp(min=-6e4, max=0).to(torch.float16).numpy()
    return LogitTable(places, truth, ids, logps)


def target_losses(model: Any, rows: Sequences) -> F32:
    """Cross-entropy of each text's target in nats, (texts,); no gradient."""
    places = places_of(rows)
    losses = np.zeros(len(places.tokens), np.float32)
    for group, where in _batches(model, rows, places):
        with torch.inference_mode():
            wanted = torch.from_numpy(places.tokens[where].astype(np.int64))
            logits = _logits(model, rows.pick(group))
            losses[where] = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    sums = np.bincount(places.owner(), weights=losses, minlength=len(rows))
    return sums.astype(np.float32)


def teach(
    adapter: Adapter,
    rows: Sequences,
    targets: Targets,
    chosen: npt.NDArray[np.bool_],
    how: Lesson,
    *,
    seed: int,
    progress: Progress | None = None,
    at_once: int = 0,
    checkpoint: Checkpoint | None = None,
    gate: Gate | None = None,
) -> float:
    """Learn lambda CE(labels) + (1 - lambda) CE(targets of the `chosen` texts); the last loss.

    `at_once` texts go through the model together (0: a whole step's), gradients add up.
    `checkpoint` and `gate` as in `train_adapter`.

    Raises:
        FleetError: the loss is no longer a number; lower lr. Whatever `gate` raises.

    Source: FedMKT (arXiv 2406.02224) equations for L2 and L3; PAPERS.md 2 (b), steps 5 and 8.
    """
    if not len(rows) or how.steps == 0:
        return 0.0
    owner = targets.places.owner()
    truth = torch.from_numpy(targets.places.tokens.astype(np.int64))
    ids, mass = torch.from_numpy(targets.ids), torch.from_numpy(targets.mass)
    taught = torch.from_numpy(chosen[owner].astype(np.float32)) * (1 - how.share)  # (places,)
    at = np.split(np.arange(len(owner)), targets.places.starts[1:-1])  # each text's places
    groups = shuffled_batches(len(rows), how.batch, seed=seed)

    def losses_of(group: list[int]) -> torch.Tensor:
        where = torch.from_numpy(np.concatenate([at[i] for i in group]))
        logits = _logits(adapter.model, rows.pick(group))
        return mixed_loss(logits, truth[where], ids[where], mass[where], how.share, taught[where])

    def loss_of_step() -> torch.Tensor | Iterator[torch.Tensor]:
        group = next(groups)
        if not 0 < at_once < len(group):
            return losses_of(group).mean()
        total = sum(len(at[i]) for i in group)
        parts = (group[i : i + at_once] for i in range(0, len(group), at_once))
        return (losses_of(part).sum() / total for part in parts)

    def skip_step() -> None:
        next(groups)

    last = 0.0
    course = optimize(
        adapter,
        loss_of_step,
        steps=how.steps,
        lr=how.lr,
        checkpoint=checkpoint,
        skip_step=skip_step,
        gate=gate,
    )
    for done, last in enumerate(course, 1):
        if progress is not None:
            progress(done, how.steps, last)
    return last


def mixed_loss(
    logits: torch.Tensor,
    truth: torch.Tensor,
    ids: torch.Tensor,
    mass: torch.Tensor,
    share: float,
    taught: torch.Tensor,
) -> torch.Tensor:
    """share CE(truth) + taught CE(targets), at every place, (n,).

    `logits` (n, V); `truth` (n,) and `ids` (n, k) int64; `mass` (n, k); `taught` (n,). Each row is
    a distribution over its k tokens and "any other", and its loss is least at p = q:
    -sum_j q_j log p_j - (1 - sum q) log(1 - sum p). Entries of no mass count as other tokens.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    picked = log_p.gather(1, torch.cat([truth[:, None], ids], dim=1))  # (n, 1 + k)
    own, said = picked[:, 0], picked[:, 1:]
    held = mass > 0
    rest = (1 - mass.sum(dim=1)).clamp(min=0)
    left = 1 - (said.exp() * held).sum(dim=1)
    soft = (mass * said).sum(dim=1) + rest * left.clamp(min=LEAST_TAIL).log()
    return -(share * own + taught * soft)


def _logits(model: Any, rows: Sequences) -> torch.Tensor:
    """Logits for every token to be predicted, in the order of `Places`, (places, V) float32."""
    owner = [i for i, row in enumerate(rows.ids) for _ in range(rows.starts[i], len(row))]
    column = [t - 1 for i, row in enumerate(rows.ids) for t in range(rows.starts[i], len(row))]
    return logits_at(model, padded(rows.ids), torch.tensor(owner), torch.tensor(column))


def _batches(
    model: Any, rows: Sequences, places: Places
) -> Iterator[tuple[list[int], npt.NDArray[np.int64]]]:
    """Row numbers of a batch, and where their places are among all."""
    size = int(model.get_input_embeddings().weight.shape[0])
    for group in batches(rows.ids, tokens=max(64, MOST_LOGITS // size)):
        where = [np.arange(places.starts[i], places.starts[i + 1]) for i in group]
        yield group, np.concatenate(where)
