"""A pretraining run and its checkpoint.  Does not know how a step is taken.

A run begins with fresh weights, with its own checkpoint, or with the weights that another run of
the same sizes ended with.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from examples.data.corpus import Corpus, CorpusError, Texts
from examples.models.optimizers import Optimizers
from examples.models.recipes import Recipe, build
from examples.models.tokenizer import train_tokenizer


def save_whole(value: object, path: Path) -> None:
    """Write a file that is either the old one or the new one, never a torn one."""
    draft = path.with_suffix(".part")
    with draft.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def identity(recipe: Recipe, corpus: Corpus) -> str:
    """What a checkpoint must agree on.  `steps` is left out: a run may be shortened."""
    files = [file.sha256 for file in corpus.files]
    streams = [(stream.name, stream.weight) for stream in corpus.streams]
    return hashlib.sha256(repr((replace(recipe, steps=0), files, streams)).encode()).hexdigest()


@dataclass(slots=True)
class Run:
    """A training run at one step; its checkpoint is all of it."""

    recipe: Recipe
    corpus: Corpus
    tokenizer: Tokenizer
    texts: dict[str, Texts]
    model: transformers.PreTrainedModel
    optimizers: Optimizers
    step: int
    seconds: float
    losses: list[tuple[int, float]]
    checkpoint: Path

    def save(self) -> None:
        save_whole(
            {
                "identity": identity(self.recipe, self.corpus),
                "model": self.model.state_dict(),
                "optimizers": self.optimizers.state(),
                "step": self.step,
                "steps": self.recipe.steps,
                "seconds": self.seconds,
                "losses": self.losses,
                "rng": torch.get_rng_state(),
            },
            self.checkpoint,
        )


def open_run(recipe: Recipe, corpus: Corpus, data: Path, work: Path) -> Run:
    """A fresh run, or the one whose checkpoint lies in `work`.

    Raises:
        CorpusError: a file is not as expected, or the checkpoint or the run that this one
            continues does not belong to it.
    """
    work.mkdir(parents=True, exist_ok=True)
    texts = corpus.texts(data)
    cached = work / "tokenizer.json"
    if not cached.exists():
        draft = cached.with_suffix(".part")
        train_tokenizer(recipe, texts).save(str(draft))
        draft.replace(cached)
    tokenizer = Tokenizer.from_file(str(cached))
    torch.manual_seed(recipe.seed)
    model = build(recipe)
    model.set_attn_implementation(recipe.attention)
    checkpoint = work / f"{recipe.name}.pt"
    run = Run(
        *(recipe, corpus, tokenizer, texts, model, Optimizers(model, recipe)),
        *(0, 0.0, [], checkpoint),
    )
    if checkpoint.exists():
        _restore(run)
    elif recipe.start is not None:
        _continue(run, recipe.start, work / f"{recipe.start.name}.pt")
    return run


def _read(checkpoint: Path, recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    if saved["identity"] != identity(recipe, corpus):
        raise CorpusError(
            f"{checkpoint} belongs to another recipe or corpus; choose another --work folder"
        )
    return saved


def _continue(run: Run, start: Recipe, checkpoint: Path) -> None:
    saved: dict[str, Any] = {"step": 0}
    if checkpoint.exists():
        saved = _read(checkpoint, start, run.corpus)
    if saved["step"] != start.steps:
        raise CorpusError(
            f"{checkpoint} is at step {saved['step']} of {start.steps}; finish {start.name} "
            f"before {run.recipe.name}, which continues it"
        )
    run.model.load_state_dict(saved["model"])
    run.seconds, run.losses = saved["seconds"], [tuple(pair) for pair in saved["losses"]]


def _restore(run: Run) -> None:
    saved = _read(run.checkpoint, run.recipe, run.corpus)
    steps = saved["steps"]
    decays_from = min(steps, run.recipe.steps) * (1 - run.recipe.decay)
    if steps != run.recipe.steps and saved["step"] > decays_from:
        raise CorpusError(
            f"{run.checkpoint} is at step {saved['step']}, too far to change its {steps} steps; "
            f"continue with --steps {steps} or choose another --work folder"
        )
    run.model.load_state_dict(saved["model"])
    run.optimizers.load_state(saved["optimizers"])
    run.step, run.seconds = saved["step"], saved["seconds"]
    run.losses = [tuple(pair) for pair in saved["losses"]]
    torch.set_rng_state(saved["rng"])
