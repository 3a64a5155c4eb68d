"""A training in a process of its own, to be killed: prints a line per step taken, then the result.

python -m tests.training_process FOLDER: the bundle is FOLDER/bundle, the checkpoint
FOLDER/checkpoint, the factors go to FOLDER/change.npz.
"""

import sys
from pathlib import Path

import numpy as np

from edge_sdk.measure import Stopwatch
from edge_sdk.train.local import Means, train_locally
from edge_sdk.train.lora import Factors
from edge_sdk.wire.messages import TrainAdapter
from examples.training_lab import write_bundle
from tests.learning_world import TASK, examples, model, tokenizer

ORDER = TrainAdapter(
    task_id="t1", round=0, family="tiny", release="r1", adapter=b"", adapter_seed=1, rank=2,
    alpha=4.0, targets=("q_proj", "down_proj"), codec_id="none", codec=b"", steps=12, batch=4,
    lr=0.01, synthetic_weight=0.5, bytes_target=0, seed=3,
)  # fmt: skip
MADE = [("name the items", "list", 0.5), ("plus two", "sum", 1.0), ("once a cat", "story", 0.25)]


def bundle(folder: Path) -> Path:
    """A bundle of random int4 weights that the tokenizer of the tests fits."""
    config = model(width=64).config
    config.architectures = ["LlamaForCausalLM"]
    write_bundle(folder, config)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def train(
    folder: Path, *, order: TrainAdapter = ORDER, memory_mb: int = 0, **how: object
) -> Factors:
    """The training of these tests, with its checkpoint after every step."""
    means = Means(memory_mb, 1, 128, folder / "checkpoint", 0.0)
    return train_locally(
        order, folder / "bundle", TASK, examples(20, seed=1), MADE, means=means, seed=order.seed,
        watch=Stopwatch(), **how,
    )  # type: ignore[arg-type] # fmt: skip


def told(done: int, _of: int, _loss: float) -> None:
    """Say a step is done to whoever reads standard output."""
    sys.stdout.write(f"step {done}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    change = train(place, progress=told)
    np.savez(place / "change.npz", **change)
