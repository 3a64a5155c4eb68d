"""Trains an adapter on labelled texts that stay where they are.

Knows batches, the loss and the optimizer. Does not know messages, codecs, files or devices.
Random draws come from the seed alone, so the same call gives the same factors.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edge_sdk.errors import DataError, FleetError, Postponed
from edge_sdk.train.checkpoint import Checkpoint
from edge_sdk.train.lora import Adapter, Factors
from edge_sdk.train.text_task import Sequences, TaskReader, logits_at, padded

logger = logging.getLogger(__name__)

Labelled = tuple[str, str]
"""A text and its label."""

Weighted = tuple[str, str, float]
"""A synthetic text, its label and its weight in [0, 1]."""

Progress = Callable[[int, int, float], None]
"""Called after each step with steps done, steps in all, and the step's loss."""

BALANCE = 0.5
"""Power of a device's own label shares that training takes out of the answer (0: none, 1: all).
Devices see few of the labels; without this each learns to say its common ones, and their mean too.
The shares stay on the device."""

Gate = Callable[[], None]
"""Called before each step; returns when it may be taken, or raises (`edge_sdk.train.policy`)."""

CLIP_NORM = 1.0
WARM_UP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The trained factors, mean loss of the last quarter of steps (nats per label), seconds, and
    the number of examples trained on."""

    factors: Factors
    loss: float
    seconds: float
    examples: int


def train_adapter(
    adapter: Adapter,
    reader: TaskReader,
    examples: Sequence[Labelled],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    synthetic: Sequence[Weighted] = (),
    synthetic_weight: float = 0.0,
    balance: float = BALANCE,
    progress: Progress | None = None,
    rows: int = 0,
    checkpoint: Checkpoint | None = None,
    gate: Gate | None = None,
) -> TrainResult:
    """Train the adapter from its present factors with CE(examples) + mu CE(synthetic).

    `batch` private texts a step, and half as many synthetic ones when `synthetic_weight` (mu) is
    above 0. AdamW on the factors only, linear warm-up then cosine to a tenth, norm clipped. CE of
    the examples is taken with `balance` times the log of the examples' label shares added to the
    labels' logits, so that the model learns what tells labels apart rather than their shares.

    `rows` sequences go through the model at once (0: a whole step's), gradients add up: less
    memory, the same step but for rounding. With a `checkpoint` a training that was cut off goes on
    where it was, to the same factors bit for bit. `gate` is called before each step.

    Raises:
        DataError: no examples, or a label that is not of the task.
        FleetError: the loss is no longer a number; lower lr. Whatever `gate` raises.

    Source: client objective L_k of CrossLM (arXiv 2312.05842), PAPERS.md 1 (b); logit adjustment
    of Menon et al. (arXiv 2007.07314), under the label skew of federated clients
    (FedLC, arXiv 2209.00189).
    """
    if not examples:
        raise DataError("training needs at least one example; collect some first")
    began = time.monotonic()
    own = reader.labelled([text for text, _ in examples], [label for _, label in examples])
    given = list(synthetic) if synthetic_weight > 0 else []
    extra = reader.labelled([text for text, _, _ in given], [label for _, label, _ in given])
    weights = torch.tensor([weight for _, _, weight in given])
    own_rows = shuffled_batches(len(own), batch, seed=seed)
    extra_rows = shuffled_batches(len(extra), max(1, batch // 2), seed=seed + 1)
    offsets = _offsets(reader, [label for _, label in examples], balance)
    losses: list[float] = []

    def loss_of_step() -> torch.Tensor | Iterator[torch.Tensor]:
        drawn = next(own_rows)
        part, n = own.pick(drawn), len(drawn)
        if not given:
            if 0 < rows < n:
                return _loss_in_parts(adapter, part, torch.full((n,), 1 / n), offsets, n, rows)
            return _label_losses(adapter, part, offsets, n).mean()
        more = next(extra_rows)
        chosen = extra.pick(more)
        joined = Sequences(part.ids + chosen.ids, part.starts + chosen.starts)
        share = weights[more]
        total = share.sum().clamp(min=1e-6)
        if 0 < rows < len(joined):
            each = torch.cat([torch.full((n,), 1 / n), synthetic_weight * share / total])
            return _loss_in_parts(adapter, joined, each, offsets, n, rows)
        both = _label_losses(adapter, joined, offsets, n)
        mixed = (both[n:] * share).sum() / total
        return both[:n].mean() + synthetic_weight * mixed

    def skip_step() -> None:
        next(own_rows)
        if given:
            next(extra_rows)

    course = optimize(
        adapter,
        loss_of_step,
        steps=steps,
        lr=lr,
        checkpoint=checkpoint,
        skip_step=skip_step,
        gate=gate,
    )
    for done, loss in enumerate(course, start=1):
        losses.append(loss)
        if progress is not None:
            progress(done, steps, loss)
    tail = losses[-max(1, steps // 4) :]
    seconds = time.monotonic() - began
    logger.info("trained %d steps on %d examples in %.1f s", steps, len(examples), seconds)
    return TrainResult(
        adapter.factors(), float(np.mean(tail)) if tail else math.nan, seconds, len(examples)
    )


def optimize(
    adapter: Adapter,
    loss_of_step: Callable[[], torch.Tensor | Iterable[torch.Tensor]],
    *,
    steps: int,
    lr: float,
    checkpoint: Checkpoint | None = None,
    skip_step: Callable[[], None] | None = None,
    gate: Gate | None = None,
) -> Iterator[float]:
    """Take `steps` AdamW steps on the adapter, yielding each step's loss.

    The loss of a step may come in parts that sum to it; each part's graph is freed before the next
    is asked for. With a `checkpoint`, steps it has are not taken again: their losses are yielded
    and `skip_step` is called for each, to draw what the step would have drawn.

    Raises:
        FleetError: the loss is no longer a number; lower lr. Whatever `gate` raises.
    """
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    losses = checkpoint.restore(adapter, optimizer) if checkpoint else []
    for loss in losses:
        if skip_step is not None:
            skip_step()
        yield loss
    for step in range(len(losses), steps):
        _pass(gate, adapter, optimizer, losses, checkpoint)
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule(step, steps)
        optimizer.zero_grad()
        losses.append(_backward(loss_of_step(), step, lr))
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), CLIP_NORM)
        optimizer.step()
        if checkpoint is not None:
            checkpoint.after_step(adapter, optimizer, losses)
        yield losses[-1]


def _pass(
    gate: Gate | None,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    checkpoint: Checkpoint | None,
) -> None:
    if gate is None:
        return
    try:
        gate()
    except Postponed:
        if checkpoint is not None and losses:
            checkpoint.write(adapter, optimizer, losses)
        raise


def _backward(loss: torch.Tensor | Iterable[torch.Tensor], step: int, lr: float) -> float:
    value = 0.0
    for part in (loss,) if isinstance(loss, torch.Tensor) else loss:
        value += float(part.detach())
        if not math.isfinite(value):
            raise FleetError(f"training diverged at step {step}: loss {value}; lower lr {lr}")
        part.backward()  # type: ignore[no-untyped-call]
    return value


def shuffled_batches(n: int, batch: int, *, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers: every row once per epoch, the last short batch dropped
    unless it is the only one."""
    rng = np.random.default_rng(seed)
    while n:
        order = rng.permutation(n).tolist()
        size = min(batch, n)
        for start in range(0, n - size + 1, size):
            yield order[start : start + size]


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, round(steps * WARM_UP_SHARE))
    if step < warm_up:
        return (step + 1) / warm_up
    along = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * along))


def _offsets(reader: TaskReader, labels: Sequence[str], balance: float) -> dict[int, float]:
    """What is added to the logit of each label's first token; nothing where it would not decide."""
    if balance == 0 or not reader.one_token_decides:
        return {}
    n = len(reader.words)
    counts = np.bincount([reader.label_index(label) for label in labels], minlength=n)
    shares = (counts + 1.0) / (counts.sum() + n)  # one more of each, so that none is never
    return {
        word[0]: balance * math.log(share * n)
        for word, share in zip(reader.words, shares, strict=True)
    }


def _label_losses(
    adapter: Adapter, batch: Sequences, offsets: dict[int, float], adjusted: int
) -> torch.Tensor:
    """Negative log-probability of each sequence's answer, (B,); `offsets` for the first rows."""
    rows = [i for i, row in enumerate(batch.ids) for _ in range(batch.starts[i], len(row))]
    columns = [t - 1 for i, row in enumerate(batch.ids) for t in range(batch.starts[i], len(row))]
    wanted = [t for i, row in enumerate(batch.ids) for t in row[batch.starts[i] :]]
    owner = torch.tensor(rows)
    logits = logits_at(adapter.model, padded(batch.ids), owner, torch.tensor(columns))
    if offsets and adjusted:
        first = [
            j
            for j, (i, t) in enumerate(zip(rows, columns, strict=True))
            if i < adjusted and t == batch.starts[i] - 1
        ]
        shift = torch.zeros_like(logits)
        tokens = torch.tensor(list(offsets))
        shift[torch.tensor(first)[:, None], tokens] = torch.tensor(list(offsets.values()))
        logits = logits + shift
    chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(wanted)[:, None])[:, 0]
    return torch.zeros(len(batch)).index_add(0, owner, -chosen)  # (B,)


def _loss_in_parts(
    adapter: Adapter,
    batch: Sequences,
    each: torch.Tensor,
    offsets: dict[int, float],
    adjusted: int,
    rows: int,
) -> Iterator[torch.Tensor]:
    """Sum of each * loss over the batch, `rows` sequences at a time."""
    for start in range(0, len(batch), rows):
        part = batch.pick(range(start, min(start + rows, len(batch))))
        found = _label_losses(adapter, part, offsets, max(0, adjusted - start))
        yield (found * each[start : start + rows]).sum()
