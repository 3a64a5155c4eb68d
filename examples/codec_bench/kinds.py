"""The three kinds of work: topics in a decoder, labels in an encoder, a large adapter.

Knows the reference models, the files and the losses. Does not know rounds, codecs or results.

`lm`: slm-b, LoRA of rank 8 on all linear layers of its last three layers; every client has texts of
one AG News topic (two clients a topic); next token. `large`: the same with rank 64 on the last four
layers. `encoder`: slm-c, LoRA of rank 8 on its last three layers, and its head (dense layer and
classifier, which are part of the update); TREC's questions, labels skewed by Dirichlet(0.5).
Layers below the adapted ones keep their weights; nothing is cut off the models.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from edge_sdk.train.local import quickest_dtype
from edge_sdk.train.lora import start_factors
from examples.codec_bench.fleet import CLIENTS, F32, Leaves, Settings, Task
from examples.codec_bench.models import Decoder, Encoder
from examples.data.corpus import CorpusError
from examples.learning.tasks import TASKS, files_of, rows_of, sha256_of, verify
from examples.models import materialize

LM = Settings(
    rank=8, adapted=3, tokens=32, steps=10, batch=4, lr=2e-3, rows=800, held_out=48
)  # fmt: skip
LARGE = Settings(
    rank=64, adapted=4, tokens=32, steps=10, batch=2, lr=2e-3, rows=800, held_out=48
)  # fmt: skip
ENCODER = Settings(
    rank=8, adapted=3, tokens=24, steps=10, batch=4, lr=5e-4, rows=400, held_out=480
)  # fmt: skip
SKEW = 0.5
"""Dirichlet parameter of the encoder clients' labels."""

FILES = {"lm": "agnews", "large": "agnews", "encoder": "trec"}
"""Whose files each kind of work reads, as `examples/learning/tasks.py` names them."""


class LanguageWork:
    """Next-token loss of slm-b on AG News, a topic a client."""

    def __init__(self, name: str, data: Path, settings: Settings, verified: bool) -> None:
        folder = materialize("slm-b")
        self.name, self.settings, self.dtype = name, settings, quickest_dtype()
        self._model = Decoder(folder, adapted=settings.adapted, dtype=self.dtype)
        self.shapes = self._model.adapter_shapes(settings.rank)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        task = TASKS["agnews"]
        topics = [_of_label(rows_of(data, task.train, verified), label) for label in task.labels]
        held = [_of_label(rows_of(data, task.test, verified), label) for label in task.labels]
        sides = CLIENTS // len(topics)  # clients of one topic
        ids = torch.cat(
            [
                _windows(texts[side::sides], tokenizer, settings.tokens, settings.rows)
                for texts in topics
                for side in range(sides)
            ]
        )
        self._ids, self._states = ids, self._model.below(ids[:, :-1])
        self._held = torch.cat(
            [_windows(texts, tokenizer, settings.tokens, settings.held_out) for texts in held]
        )
        self._held_states = self._model.below(self._held[:, :-1])

    def initial(self, seed: int) -> dict[str, F32]:
        """The product's zero adapter."""
        return _adapter(self.shapes, seed)

    def rows_of(self, seed: int) -> Sequence[npt.NDArray[np.int64]]:
        """The same for every seed."""
        return np.split(np.arange(len(self._ids)), CLIENTS)

    def loss(self, leaves: Leaves, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """As `Task.loss`, in nats a token."""
        chosen = torch.from_numpy(rows.reshape(-1))
        found = self._loss(leaves, self._states[chosen], self._ids[chosen])
        return found.view(len(rows), -1).mean(dim=1)

    def held_out_loss(self, leaves: Leaves) -> float:
        """As `Task.held_out_loss`; topics count alike."""
        return float(self._loss(leaves, self._held_states, self._held).mean())

    def _loss(self, leaves: Leaves, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self._model.token_losses(states, ids[:, 1:], leaves)


class LabelWork:
    """Cross-entropy of slm-c with its head on TREC, labels skewed."""

    def __init__(self, name: str, data: Path, settings: Settings, verified: bool) -> None:
        folder = materialize("slm-c")
        self.name, self.settings, self.dtype = name, settings, quickest_dtype()
        self._model = Encoder(folder, adapted=settings.adapted, dtype=self.dtype)
        task = TASKS["trec"]
        self._labels = list(task.labels)
        self.shapes = self._model.adapter_shapes(settings.rank) | {
            "head.dense.weight": tuple(self._model.weights["head.dense.weight"].shape),
            "classifier.weight": (len(self._labels), int(self._model.config["hidden_size"])),
            "classifier.bias": (len(self._labels),),
        }
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._train = self._read(rows_of(data, task.train, verified), tokenizer)
        self._held = self._read(rows_of(data, task.test, verified)[: settings.held_out], tokenizer)

    def initial(self, seed: int) -> dict[str, F32]:
        """The product's zero adapter, the pretrained dense layer, a classifier of zeros."""
        dense = self._model.weights["head.dense.weight"].float().numpy()
        return _adapter(self.shapes, seed) | {"head.dense.weight": dense}

    def rows_of(self, seed: int) -> Sequence[npt.NDArray[np.int64]]:
        """Every client's rows, by its own mix of labels."""
        rng, labels = np.random.default_rng([seed, 77]), self._train[2].numpy()
        by_label = [np.flatnonzero(labels == i) for i in range(len(self._labels))]
        dealt = []
        for mix in rng.dirichlet(np.full(len(by_label), SKEW), CLIENTS):
            counts = rng.multinomial(self.settings.rows, mix)
            dealt.append(
                np.concatenate([rng.choice(r, n) for r, n in zip(by_label, counts, strict=True)])
            )
        return dealt

    def loss(self, leaves: Leaves, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """As `Task.loss`, in nats a label."""
        chosen = torch.from_numpy(rows.reshape(-1))
        states, mask, labels = (part[chosen] for part in self._train)
        found = self._loss(leaves, states, mask, labels)
        return found.view(len(rows), -1).mean(dim=1)

    def held_out_loss(self, leaves: Leaves) -> float:
        """As `Task.held_out_loss`."""
        return float(self._loss(leaves, *self._held).mean())

    def _loss(
        self, leaves: Leaves, states: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        h = self._model.states(states, mask, leaves)
        pooled = (h * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        dense, classifier = leaves["head.dense.weight"], leaves["classifier.weight"]
        x = pooled.to(self.dtype).view(len(dense), -1, pooled.shape[-1])  # (K, b, width)
        x = functional.gelu(torch.bmm(x, dense.transpose(1, 2)))
        norm = self._model.weights["head.norm.weight"]
        x = functional.layer_norm(x, x.shape[-1:], norm, None, self._model.eps)
        logits = torch.bmm(x, classifier.transpose(1, 2)) + leaves["classifier.bias"][:, None]
        return functional.cross_entropy(
            logits.view(len(labels), -1).float(), labels, reduction="none"
        )

    def _read(
        self, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        read = [found for row in rows if (found := TASKS["trec"].read(row)) is not None]
        tokenizer.enable_truncation(self.settings.tokens)
        tokenizer.enable_padding(length=self.settings.tokens)
        encoded = tokenizer.encode_batch([text for text, _ in read])
        ids = torch.tensor([one.ids for one in encoded])
        mask = torch.tensor([one.attention_mask for one in encoded]).bool()
        labels = torch.tensor([self._labels.index(label) for _, label in read])
        return self._model.below(ids, mask), mask, labels


KINDS: dict[str, tuple[Callable[[str, Path, Settings, bool], Task], Settings]] = {
    "lm": (LanguageWork, LM),
    "encoder": (LabelWork, ENCODER),
    "large": (LanguageWork, LARGE),
}


@cache
def open_task(name: str, data: Path, verified: bool = True) -> Task:
    """The named kind of work, made once in a process.

    Raises:
        CorpusError: a file is missing or altered.
        ModelError: a reference model is damaged.
    """
    kind, settings = KINDS[name]
    return kind(name, data, settings, verified)


def files_read(name: str, data: Path, verified: bool = True) -> dict[str, str]:
    """Path and sha256 of every file that this kind of work reads; not looked at when `verified`."""
    found = files_of([FILES[name]])
    return {p: f.sha256 if verified else sha256_of(data, f) for p, f in found.items()}


def check_files(names: Sequence[str], data: Path, verified: bool = True) -> None:
    """Look at every file that these kinds of work read.

    Raises:
        CorpusError: names all files that are missing or altered.
    """
    verify(data, sorted({FILES[name] for name in names}), verified=verified)


def _adapter(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, F32]:
    factors = {n: (s[0], s[1]) for n, s in shapes.items() if ".lora_" in n}
    rest = {n: np.zeros(s, np.float32) for n, s in shapes.items() if n not in factors}
    return start_factors(factors, seed) | rest


def _of_label(rows: Sequence[dict[str, Any]], label: str) -> list[str]:
    return [" ".join(str(row["text"]).split()) for row in rows if str(row["label"]) == label]


def _windows(texts: Sequence[str], tokenizer: Tokenizer, tokens: int, most: int) -> torch.Tensor:
    """The texts one after another, cut into `most` windows of tokens + 1 ids."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text).ids, 0]
        if len(ids) >= most * (tokens + 1):
            break
    if len(ids) < most * (tokens + 1):
        raise CorpusError(f"{len(ids)} tokens are too few for {most} windows of {tokens + 1}")
    return torch.tensor(ids[: most * (tokens + 1)]).view(most, tokens + 1)
