"""Trains an adapter on labelled texts that stay where they are.

Knows batches, the loss and the optimizer. Does not know messages, codecs, files or devices.
Random draws come from the seed alone, so the same call gives the same factors.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_sdk.errors import DataError, FleetError
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

CLIP_NORM = 1.0
WARM_UP_SHARE = 0.1
SHORT_TOKENS = 128
"""Up to this width attention is computed in the plain way: torch's fused CPU backward pass costs a
third of a whole step on a 3 M model at 40 tokens, and its saving of memory does not matter yet."""


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
) -> TrainResult:
    """Train the adapter from its present factors with CE(examples) + mu CE(synthetic).

    `batch` private texts a step, and half as many synthetic ones when `synthetic_weight` (mu) is
    above 0. AdamW on the factors only, linear warm-up then cosine to a tenth, norm clipped. CE of
    the examples is taken with `balance` times the log of the examples' label shares added to the
    labels' logits, so that the model learns what tells labels apart rather than their shares.

    Raises:
        DataError: no examples, or a label that is not of the task.
        FleetError: the loss is no longer a number; lower lr.

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

    def loss_of_step() -> torch.Tensor:
        rows = next(own_rows)
        part = own.pick(rows)
        if not given:
            return _label_losses(adapter, part, offsets, len(rows)).mean()
        more = next(extra_rows)
        chosen = extra.pick(more)
        joined = Sequences(part.ids + chosen.ids, part.starts + chosen.starts)
        both = _label_losses(adapter, joined, offsets, len(rows))
        share = weights[more]
        mixed = (both[len(rows) :] * share).sum() / share.sum().clamp(min=1e-6)
        return both[: len(rows)].mean() + synthetic_weight * mixed

    with short_attention(min(reader.max_tokens, max(map(len, own.ids + extra.ids)))):
        for done, loss in enumerate(optimize(adapter, loss_of_step, steps=steps, lr=lr), start=1):
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
    adapter: Adapter, loss_of_step: Callable[[], torch.Tensor], *, steps: int, lr: float
) -> Iterator[float]:
    """Take `steps` AdamW steps on the adapter, yielding each step's loss.

    Raises:
        FleetError: the loss is no longer a number; lower lr.
    """
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule(step, steps)
        loss = loss_of_step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FleetError(f"training diverged at step {step}: loss {value}; lower lr {lr}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), CLIP_NORM)
        optimizer.step()
        yield value


def shuffled_batches(n: int, batch: int, *, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers: every row once per epoch, the last short batch dropped
    unless it is the only one."""
    rng = np.random.default_rng(seed)
    while n:
        order = rng.permutation(n).tolist()
        size = min(batch, n)
        for start in range(0, n - size + 1, size):
            yield order[start : start + size]


@contextlib.contextmanager
def short_attention(width: int) -> Iterator[None]:
    """Within this block attention over at most SHORT_TOKENS tokens is computed the plain way."""
    with sdpa_kernel(SDPBackend.MATH) if width <= SHORT_TOKENS else contextlib.nullcontext():
        yield


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
    if offsets:
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
