"""One cell of `bench_eora.py`: a model compressed in one way, with every branch, measured.

Knows the reference models, the corpora and `compression`. Does not know the command line.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

from compression.eora import (
    F64,
    Factors,
    Moments,
    as_factors,
    branch,
    diagonal_root,
    eigen_root,
    one_pass,
    probe,
    sketch,
    sketch_root,
)
from compression.eora_torch import branches_on, calibrate, covariances, groups
from compression.quantize import bits_per_weight, gptq, prune_2_4, rtn, sparse_gpt_2_4
from examples.eora_texts import (
    SEED,
    bits_per_byte,
    linears,
    load,
    questions,
    requests,
    task_scores,
    train_task,
    wikitext,
    windows,
)
from examples.learning.tasks import TASKS
from examples.models import materialize

Row = dict[str, str]
HELD_OUT = 16
"""Windows measured per text: about 4,000 tokens; all arms read the same ones."""
SKETCH = 64
"""Columns that a device sends instead of C in the rows "one pass, sketch"."""
FIELDS = (
    "model", "weights", "branch", "rank", "bits_per_weight", "wikitext2_bpb", "wikitext2_se",
    "requests_bpb", "recovered",
)  # fmt: skip
TASK_FIELDS = ("model", "weights", "branch", "rank", "bits_per_weight", "accuracy", "nats")


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the corpora are, the ranks to try, and how many windows to calibrate on."""

    data: Path
    ranks: tuple[int, ...]
    windows: int = 24


@dataclass(frozen=True, slots=True)
class Scheme:
    """A compression: its function (W, C) -> Wq, its stored bits, and which branches are tried.

    Attributes:
        blind: it does not look at C, so weights are compressed before anything runs.
        all_arms: baselines and one-pass variants too, not only EoRA.
    """

    compress: Callable[[F64, F64], F64]
    bits: Callable[[tuple[int, int]], float]
    blind: bool = True
    all_arms: bool = True


def _sparse(_: tuple[int, int]) -> float:
    return 16 / 2 + 1  # half of the 16-bit values, and 4 bits for which two of each four


SCHEMES = {
    "int4 g32": Scheme(lambda W, _: rtn(W, 4, block=32), lambda s: bits_per_weight(s, 4, block=32)),
    "int3 g32": Scheme(lambda W, _: rtn(W, 3, block=32), lambda s: bits_per_weight(s, 3, block=32)),
    "2:4": Scheme(lambda W, _: prune_2_4(W), _sparse),
    "int3 g32 gptq": Scheme(
        lambda W, C: gptq(W, C, 3, block=32),
        lambda s: bits_per_weight(s, 3, block=32),
        False,
        False,
    ),
    "int3 channel": Scheme(lambda W, _: rtn(W, 3), lambda s: bits_per_weight(s, 3)),
    "int4 channel": Scheme(lambda W, _: rtn(W, 4), lambda s: bits_per_weight(s, 4)),
    "2:4 sparsegpt": Scheme(sparse_gpt_2_4, _sparse, False, False),
    "int8 g32": Scheme(
        lambda W, _: rtn(W, 8, block=32), lambda s: bits_per_weight(s, 8, block=32), True, False
    ),
}


class Lab:
    """One reference model, its texts, and its weights under one compression."""

    def __init__(
        self, name: str, scheme: Scheme, settings: Settings, trained: Path | None = None
    ) -> None:
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.scheme, self.settings = scheme, settings
        self.folder = materialize(name)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.model: Any = load(self.folder)
        if trained is not None:
            self.model.load_state_dict(load_file(trained), strict=False)
        self.names = linears(self.model)
        self.original = {n: self._weight(n) for n in self.names}
        self.errors: dict[str, F64] = {}

    def _weight(self, name: str) -> F64:
        value: F64 = self.model.get_submodule(name).weight.detach().double().numpy().copy()
        return value

    def shrink(self) -> None:
        """Compress every layer, if the compression needs nothing but weights."""
        if not self.scheme.blind:
            return
        for name, W in self.original.items():
            self._place(name, self.scheme.compress(W, np.zeros((1, 1))))

    def _place(self, name: str, value: F64) -> None:
        with torch.no_grad():
            self.model.get_submodule(name).weight.copy_(torch.from_numpy(value))
        self.errors[name] = self.original[name] - value

    def error(self, name: str, _layer: Any, C: F64) -> F64:
        """D of one layer for `calibrate`, compressing it now if that needs C."""
        if not self.scheme.blind:
            self._place(name, self.scheme.compress(self.original[name], C))
        return self.errors[name]

    def walk(self, rank: int, root: Callable[[F64], F64 | None]) -> Factors:
        """Branches, layer by layer behind compensated layers."""
        if not self.scheme.blind:  # the layers still to come are seen uncompressed
            for name, W in self.original.items():
                self._place(name, W)
        return calibrate(self.model, self.calibration, self.names, self.error, rank=rank, root=root)

    @cached_property
    def calibration(self) -> list[torch.Tensor]:
        """Batches of token ids (8, LENGTH), half WikiText-2 and half what is asked of the model."""
        half = self.settings.windows // 2
        texts = (wikitext(self.settings.data, "train"), self.own_texts)
        parts = [windows(self.tokenizer, text, half)[0][:, :-1] for text in texts]
        return list(torch.cat(parts).split(8))

    own_texts: Sequence[str] = ()

    @cached_property
    def grouped(self) -> list[tuple[str, ...]]:
        """Layers that read the same tensor."""
        return groups(self.model, self.names, self.calibration[0])

    @cached_property
    def moments(self) -> Moments:
        """C of the compressed model without any branch, as devices could sum it up."""
        return covariances(self.model, self.calibration, self.names)

    @cached_property
    def roots(self) -> Moments:
        """Roots of `moments`."""
        return {name: eigen_root(C) for name, C in self.moments.items()}

    @cached_property
    def sketched(self) -> Moments:
        """Roots from SKETCH columns of C."""
        roots = {}
        for name, C in self.moments.items():
            omega = probe(name, len(C), SKETCH, seed=SEED)
            roots[name] = sketch_root(sketch(C, omega), omega)
        return roots

    def arms(self, *, task: bool) -> list[tuple[str, int, Callable[[], Factors]]]:
        """(branch, rank, how it is made), the empty one first."""
        scheme, errors = self.scheme, self.errors
        made: list[tuple[str, int, Callable[[], Factors]]] = [
            ("none", 0, (lambda: {}) if scheme.blind else (lambda: self.walk(0, eigen_root)))
        ]
        for r in self.settings.ranks:
            svd = ("svd", r, lambda r=r: as_factors({n: branch(D, r) for n, D in errors.items()}))
            act = ("act-s", r, lambda r=r: self.walk(r, diagonal_root))
            eora = ("eora", r, lambda r=r: self.walk(r, eigen_root))
            once = ("eora, one pass", r, lambda r=r: self._once(self.roots, r))
            little = ("eora, one pass, sketch", r, lambda r=r: self._once(self.sketched, r))
            if not scheme.all_arms:
                made += [eora]
            else:
                made += [svd, eora] if task else [svd, act, eora, once, little]
        return made

    def _once(self, roots: Moments, rank: int) -> Factors:
        return one_pass(self.errors, roots, self.grouped, rank=rank)

    def bits(self, rank: int) -> float:
        """Stored bits per compressed weight, the branch at 16 bits included."""
        shapes = [W.shape for W in self.original.values()]
        codes = sum(self.scheme.bits(s) * s[0] * s[1] for s in shapes)
        return (codes + sum(16 * rank * sum(s) for s in shapes)) / sum(s[0] * s[1] for s in shapes)


# ---- a cell

Found = dict[tuple[str, int], Any]


def text_cell(name: str, weights: str, settings: Settings) -> list[Row]:
    """Bits per byte of one model under one compression, without and with every branch."""
    lab = Lab(name, SCHEMES[weights], settings)
    lab.own_texts = requests("dolly_public.jsonl.xz")
    texts = (wikitext(settings.data, "valid"), requests("dolly_devices.jsonl.xz", "heldout"))
    held = [windows(lab.tokenizer, text, HELD_OUT) for text in texts]
    found = _every_arm(lab, lambda: [bits_per_byte(lab.model, *text) for text in held])
    whole, none = (np.mean(np.concatenate(found[key])) for key in (WHOLE, NONE))
    rows = []
    for key, (wiki, asked) in found.items():
        paired, here = wiki - found[NONE][0], np.mean(np.concatenate(found[key]))
        rows.append(
            _row(name, weights, key, lab)
            | {
                "wikitext2_bpb": f"{wiki.mean():.4f}",
                "wikitext2_se": f"{paired.std(ddof=1) / math.sqrt(len(paired)):.4f}",
                "requests_bpb": f"{asked.mean():.4f}",
                "recovered": f"{(none - here) / (none - whole):.0%}" if none - whole > 5e-4 else "",
            }
        )
    return rows


def task_cell(name: str, weights: str, settings: Settings) -> list[Row]:
    """TREC with one model trained on it, under one compression."""
    lab = Lab(name, SCHEMES[weights], settings, train_task(name, settings.data))
    task = TASKS["trec"]
    train, test = (questions(settings.data, part) for part in ("train", "test"))
    prompt = task.text_task().prompt
    lab.own_texts = [f"{prompt.format(text=x)} {task.labels[label]}\n" for x, label in train]
    found = _every_arm(lab, lambda: task_scores(lab.model, lab.folder, test), task=True)
    return [
        _row(name, weights, key, lab) | {"accuracy": f"{right:.3f}", "nats": f"{nats:.4f}"}
        for key, (right, nats) in found.items()
    ]


WHOLE, NONE = ("(uncompressed)", 0), ("none", 0)


def _every_arm(lab: Lab, measure: Callable[[], Any], *, task: bool = False) -> Found:
    found: Found = {WHOLE: measure()}
    lab.shrink()
    for kind, rank, make in lab.arms(task=task):
        with branches_on(lab.model, make()):
            found[kind, rank] = measure()
    return found


def _row(name: str, weights: str, key: tuple[str, int], lab: Lab) -> Row:
    bits = "32" if key == WHOLE else f"{lab.bits(key[1]):.2f}"
    found = {"model": name, "weights": weights, "branch": key[0], "rank": str(key[1])}
    return found | {"bits_per_weight": bits}
