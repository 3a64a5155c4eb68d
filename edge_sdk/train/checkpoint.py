"""Where a training stands, on disk: enough to go on after a kill as if nothing had happened.

Knows the factors, AdamW's moments and the losses so far, and one file. Does not know batches: they
follow from a seed and the number of steps done.

The file begins with a digest over everything the training depends on and the rest of the file.
Another task's, another data set's or a damaged file thus has the wrong digest and is not taken.
It holds what the device has learned, so it is readable by its owner only, and goes with the task.
"""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from compression import tensor_file
from compression.errors import CodecError
from edge_sdk.plain_files import open_plain, replace_bytes
from edge_sdk.train.lora import Adapter

logger = logging.getLogger(__name__)

EVERY_S = 60.0
"""Seconds between checkpoints: a minute of work is lost at most, and a flash disk is spared."""

MAX_BYTES = 2**31
"""A larger file is none of ours: rank 64 on every linear layer of a 7 B model takes 1.9 GB."""

_DIGEST = 32


def key_of(*parts: bytes) -> bytes:
    """A digest that names all `parts`, in order and apart."""
    seen = hashlib.sha256()
    for part in parts:
        seen.update(len(part).to_bytes(8, "little"))
        seen.update(part)
    return seen.digest()


class Checkpoint:
    """The checkpoint file of one training.

    Written at most every `every_s` seconds (0: after each step). A disk that refuses is logged, and
    the training goes on without.
    """

    def __init__(
        self,
        path: Path,
        key: bytes,
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._key, self._every_s, self._clock = path, key, every_s, clock
        self._written = clock()

    def restore(self, adapter: Adapter, optimizer: torch.optim.Optimizer) -> list[float]:
        """Put adapter and optimizer where they were; return the losses so far, none for a start."""
        tensors = self._read()
        if tensors is None:
            return []
        names, losses = list(adapter.layout), tensors["losses"]
        adapter.load({name: tensors[f"factor/{name}"] for name in names})
        for name, weight in zip(names, adapter.parameters(), strict=True):
            optimizer.state[weight] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": torch.from_numpy(tensors[f"mean/{name}"].copy()),
                "exp_avg_sq": torch.from_numpy(tensors[f"square/{name}"].copy()),
            }
        logger.info("training goes on after step %d", len(losses))
        return [float(loss) for loss in losses]

    def after_step(
        self, adapter: Adapter, optimizer: torch.optim.Optimizer, losses: list[float]
    ) -> None:
        """Write the state after len(losses) steps, when it is time."""
        if self._clock() - self._written >= self._every_s:
            self.write(adapter, optimizer, losses)

    def write(
        self, adapter: Adapter, optimizer: torch.optim.Optimizer, losses: list[float]
    ) -> None:
        """Write the state after len(losses) steps now."""
        tensors = {"losses": np.array(losses, np.float64)}
        for name, weight in zip(adapter.layout, adapter.parameters(), strict=True):
            state = optimizer.state[weight]
            tensors[f"factor/{name}"] = weight.detach().numpy()
            tensors[f"mean/{name}"] = state["exp_avg"].numpy()
            tensors[f"square/{name}"] = state["exp_avg_sq"].numpy()
        blob = save(tensors)
        try:
            replace_bytes(self._path, self._digest(blob) + blob)
        except OSError as exc:
            logger.warning("no checkpoint after step %d: %s", len(losses), exc)
        self._written = self._clock()

    def remove(self) -> None:
        """Forget the training."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, np.ndarray] | None:
        try:
            with open_plain(self._path) as file:
                data = file.read(MAX_BYTES + 1)
        except OSError:
            return None
        blob = data[_DIGEST:]
        if len(data) > MAX_BYTES or not hmac.compare_digest(data[:_DIGEST], self._digest(blob)):
            logger.info("the checkpoint found is of another training, or damaged; starting anew")
            return None
        try:
            tensors, _ = tensor_file.read(blob)
        except CodecError:
            return None
        return tensors

    def _digest(self, blob: bytes) -> bytes:
        return hashlib.sha256(self._key + blob).digest()
