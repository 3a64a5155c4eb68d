"""Compares a bundle with the model it was made of on a labelled task: does int4 still know it?

Knows both models' answers to a task's prompts. Does not know how either was made or trained.

`parity.py` asks whether the graph computes what torch computes with the same int4 weights; this
asks what those weights cost against the weights in 16 bits, in points of accuracy.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compression.int4 import WeightFile
from edge_sdk.errors import ExportError
from edge_sdk.wire.messages import TextTask
from exporters.parity import empty_cache_feed, open_session, relative

logger = logging.getLogger(__name__)

F32 = npt.NDArray[np.float32]
Model = Callable[[npt.NDArray[np.int64]], F32]
"""Token ids (1, T) -> logits (T, vocab)."""

POINTS = 1.0
"""Accuracy in points that int4 may cost."""
PROBE_TEXTS = 8
"""Texts on which layers are compared when it costs more."""


@dataclass(frozen=True, slots=True)
class TaskParity:
    """Accuracies, 0 to 1, on the same labelled texts."""

    accuracy: float
    accuracy_16bit: float

    def figures(self) -> dict[str, float]:
        """The figures by their names in a manifest."""
        return {
            "task_accuracy": round(self.accuracy, 6),
            "task_accuracy_16bit": round(self.accuracy_16bit, 6),
        }


def check_task(
    model_dir: Path,
    bundle_dir: Path,
    task: TextTask,
    labelled: Sequence[tuple[str, str]],
    *,
    points: float = POINTS,
) -> TaskParity:
    """Measure a bundle and the model in `model_dir` on `labelled` (text, label) pairs.

    Raises:
        ExportError: the bundle is more than `points` worse (says which layer lost most), there are
            no pairs, or a label is not of the task.
    """
    import torch
    from transformers import AutoModelForCausalLM

    prompts = _Prompts(bundle_dir, task, labelled)
    session = open_session(bundle_dir)

    def graph(ids: npt.NDArray[np.int64]) -> F32:
        logits: F32 = session.run(["logits"], empty_cache_feed(bundle_dir, session, ids))[0][0]
        return logits

    original = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()

    def in_16_bits(ids: npt.NDArray[np.int64]) -> F32:
        with torch.inference_mode():
            logits: F32 = original(torch.from_numpy(ids)).logits[0].float().numpy()
        return logits

    found = TaskParity(prompts.accuracy(graph), prompts.accuracy(in_16_bits))
    if 100 * (found.accuracy_16bit - found.accuracy) > points:
        worst, error = worst_quantized(bundle_dir, original, prompts.rows[:PROBE_TEXTS])
        raise ExportError(
            f"in int4 the model labels {found.accuracy:.1%} of {len(labelled)} texts of task "
            f"{task.name} right, in 16 bits {found.accuracy_16bit:.1%}; at most {points:g} points "
            f"may be lost. The worst layer is {worst} (relative error of its output {error:.3f}); "
            "a smaller block or a larger model loses less"
        )
    logger.info("task %s: %s", task.name, found)
    return found


def worst_quantized(
    bundle_dir: Path, original: Any, rows: Sequence[Sequence[int]]
) -> tuple[str, float]:
    """The linear layer whose int4 weights change its output most on `rows`, and by how much."""
    import torch

    weights, given = WeightFile(bundle_dir), dict[str, list[Any]]()
    linears = {
        name: module
        for name, module in original.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in weights
    }

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: Any, __: Any) -> None:
            given.setdefault(name, []).append(inputs[0][0].float())  # (T, in)

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in linears.items()]
    try:
        with torch.inference_mode():
            for row in rows:
                original(torch.tensor([list(row)]))
    finally:
        for hook in hooks:
            hook.remove()
    errors = {}
    for name, module in linears.items():
        x = torch.cat(given[name]).numpy()  # (tokens, in)
        exact = module.weight.detach().float().numpy()  # (out, in)
        errors[name] = relative(x @ weights.dequantize(f"{name}.weight").T, x @ exact.T)
    worst = max(errors, key=lambda name: errors[name])
    return worst, errors[worst]


class _Prompts:
    """The task's prompts as tokens; `rows[i]` is followed by one of `words`."""

    def __init__(
        self, bundle_dir: Path, task: TextTask, labelled: Sequence[tuple[str, str]]
    ) -> None:
        from tokenizers import Tokenizer

        strange = [label for _, label in labelled if label not in task.labels]
        if strange or not labelled:
            raise ExportError(
                f"{strange[0]!r} is no label of task {task.name}; its labels are "
                f"{', '.join(task.labels)}"
                if strange
                else f"task {task.name} came without labelled text to measure it on"
            )
        tokenizer = Tokenizer.from_file(str(bundle_dir / "tokenizer.json"))
        tokenizer.no_truncation()
        self.rows = [
            list(tokenizer.encode(task.prompt.replace("{text}", text)).ids) for text, _ in labelled
        ]
        self.words = [
            list(tokenizer.encode(word, add_special_tokens=False).ids) for word in task.words
        ]
        self._right = [task.labels.index(label) for _, label in labelled]

    def accuracy(self, model: Model) -> float:
        """The share of texts whose own label's word `model` finds the likeliest."""
        best = [int(self._scores(model, row).argmax()) for row in self.rows]
        return float(np.mean([a == b for a, b in zip(best, self._right, strict=True)]))

    def _scores(self, model: Model, row: list[int]) -> F32:
        """The log-probability of each label's word after `row`, (labels,)."""
        firsts = [word[0] for word in self.words]
        if len(set(firsts)) == len(firsts):  # the first token decides, as on the device
            logits: F32 = model(np.array([row], np.int64))[-1, firsts]
            return logits
        scores = np.zeros(len(self.words), np.float32)
        for i, word in enumerate(self.words):
            logits = model(np.array([row + word[:-1]], np.int64))[-len(word) :]
            logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            scores[i] = logs[np.arange(len(word)), word].sum()
        return scores
