"""One TrainAdapter task carried out here: the bundle's weights, this device's examples, a change.

Knows the order of the steps and which of them need torch. Does not know messages' replies, codecs,
storage or the network; examples come in as plain pairs and only factors go out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compression.errors import WeightsError
from compression.int4_torch import load_slm
from edge_sdk.errors import RuntimeFailure
from edge_sdk.measure import Stopwatch
from edge_sdk.train import lora
from edge_sdk.train.text_task import TaskReader
from edge_sdk.train.trainer import Labelled, Progress, Weighted, train_adapter
from edge_sdk.wire.messages import TextTask, TrainAdapter


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


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for 16-bit matrix products."""
    found: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported() and cpu_flag()
    return found


def _model(bundle: Path, means: Means) -> object:
    # 16 bits where memory is counted, and where the processor multiplies them (there a step takes
    # two thirds of the time); elsewhere they are emulated and 32 bits are several times quicker.
    dtype = torch.bfloat16 if means.memory_mb or multiplies_bfloat16() else torch.float32
    try:
        return load_slm(bundle, memory_mb=means.memory_mb or None, dtype=dtype)
    except WeightsError as exc:
        raise RuntimeFailure(f"the bundle cannot be trained on: {exc}") from exc
