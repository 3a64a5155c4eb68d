"""Eight clients that train one adapter: what any kind of work has in common.

Knows local AdamW for all clients at once, batches' seeds and the mean. Does not know models, texts
or codecs. A client's batches follow from (seed, round, client) alone, so every method is measured
on the same ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from compression.blocks import Tensors

F32 = npt.NDArray[np.float32]
Leaves = dict[str, torch.Tensor]

CLIENTS = 8
BETAS = (0.9, 0.999)


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides a kind of work, next to its data.

    Attributes:
        rank: of the adapters; adapted: how many of the last layers have one.
        tokens: of a window or, at most, of a text.
        steps, batch, lr: of a client in a round.
        rows: windows or texts of a client; held_out: of the loss that is reported.
    """

    rank: int
    adapted: int
    tokens: int
    steps: int
    batch: int
    lr: float
    rows: int
    held_out: int


class Task(Protocol):
    """A kind of work: model, data and loss. Nothing in it changes during a run."""

    name: str
    settings: Settings
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype

    def initial(self, seed: int) -> dict[str, F32]:
        """Where every client starts, by tensor name."""

    def rows_of(self, seed: int) -> Sequence[npt.NDArray[np.int64]]:
        """The training rows that each client holds."""

    def loss(self, leaves: Leaves, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Mean loss of each client (K,) on its rows (K, batch)."""

    def held_out_loss(self, leaves: Leaves) -> float:
        """Mean loss on held-out data; leaves have K = 1."""


class Fleet:
    """One run's state: the adapter that all clients start the next round from."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.names = tuple(task.shapes)
        self._sizes = [math.prod(task.shapes[name]) for name in self.names]
        start = task.initial(seed)
        flat = np.concatenate([start[name].reshape(-1) for name in self.names])
        self._global = torch.from_numpy(flat.astype(np.float32))  # (N,)
        self._rows = task.rows_of(seed)

    @property
    def size(self) -> int:
        """Coordinates of an update."""
        return len(self._global)

    @property
    def adapter(self) -> dict[str, F32]:
        """A copy of what every client starts the next round from."""
        return self._named(self._global.numpy().copy())

    def local_updates(self, round_: int, ahead: F32 | None = None) -> list[dict[str, F32]]:
        """Train every client from the present adapter; nothing else changes.

        `ahead` (CLIENTS, size) is how far from it each starts; updates count from there.
        """
        s = self.task.settings
        drawn = np.stack([self._drawn(round_, client) for client in range(CLIENTS)], axis=1)
        start = self._global.repeat(CLIENTS, 1)  # (K, N)
        if ahead is not None:
            start += torch.from_numpy(ahead)
        flat = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([flat], lr=s.lr, betas=BETAS, weight_decay=0.0, fused=True)
        for rows in drawn:  # (K, batch)
            leaves = self._leaves(flat.detach())
            loss = self.task.loss(leaves, rows).sum()  # clients do not meet in it
            grads = torch.autograd.grad(loss, list(leaves.values()))
            flat.grad = torch.cat([g.reshape(CLIENTS, -1) for g in grads], dim=1).float()
            optimizer.step()
        change = (flat.detach() - start).numpy()
        return [self._named(change[k]) for k in range(CLIENTS)]

    def apply(self, mean: Tensors) -> None:
        """Add the mean of the decoded updates to the adapter."""
        flat = np.concatenate([np.asarray(mean[name]).reshape(-1) for name in self.names])
        self._global = self._global + torch.from_numpy(flat.astype(np.float32))

    def held_out_loss(self) -> float:
        """Of the present adapter, in nats."""
        with torch.no_grad():
            return self.task.held_out_loss(self._leaves(self._global[None]))

    def _drawn(self, round_: int, client: int) -> npt.NDArray[np.int64]:
        s, rng = self.task.settings, np.random.default_rng([self.seed, round_, client])
        return np.asarray(rng.choice(self._rows[client], (s.steps, s.batch)))

    def _leaves(self, flat: torch.Tensor) -> Leaves:
        """Copies in the training dtype, each (K, *shape), that gradients are taken for."""
        parts = torch.split(flat, self._sizes, dim=1)
        leaves = {}
        for name, part in zip(self.names, parts, strict=True):
            copy = part.to(self.task.dtype, copy=True).contiguous()
            leaves[name] = copy.view(-1, *self.task.shapes[name]).requires_grad_()
        return leaves

    def _named(self, flat: Any) -> dict[str, F32]:
        parts = np.split(flat, np.cumsum(self._sizes)[:-1])
        named = zip(self.names, parts, strict=True)
        return {name: part.reshape(self.task.shapes[name]) for name, part in named}
