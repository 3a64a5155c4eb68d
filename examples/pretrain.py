"""Pretrain one example model from scratch.

    python examples/pretrain.py --model slm-a --data DATA --out OUT --work DIR

Knows the training loop.  Does not know what the corpus is made of (examples/data/corpus.py) nor how
models are built and stored (examples/models).  Stop it whenever you like: it resumes bit for bit.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.data.corpus import PUBLIC, Corpus, CorpusError, Texts
from examples.models import WEIGHTS, pack, unpack, write_sums
from examples.models.batches import IGNORED, draw, encode, pairs
from examples.models.card import Measured, card
from examples.models.recipes import RECIPES, Recipe, build
from examples.models.tokenizer import save_tokenizer, train_tokenizer

DECAY_SHARE = 0.25  # the last quarter of the run decays linearly to zero
WARM_UP_STEPS = 100
HELD_OUT_WINDOWS = 60  # per corpus: about 15 thousand tokens
LOSS_EVERY = 50


def loss_sum(model: torch.nn.Module, given: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats, in bfloat16: about three times float32's speed on AVX-512."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=given).logits  # (windows, length, vocabulary)
    kept = labels != IGNORED
    return functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum")


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warm-up, constant, then linear to zero; only that last part depends on `steps`."""
    decay_steps = max(1, round(recipe.steps * DECAY_SHARE))
    return recipe.lr * min(1.0, (step + 1) / WARM_UP_STEPS, (recipe.steps - step) / decay_steps)


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; decay for matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)


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
    optimizer: torch.optim.AdamW
    step: int
    seconds: float
    losses: list[tuple[int, float]]
    checkpoint: Path

    def save(self) -> None:
        save_whole(
            {
                "identity": identity(self.recipe, self.corpus),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "steps": self.recipe.steps,
                "seconds": self.seconds,
                "losses": self.losses,
                "rng": torch.get_rng_state(),
            },
            self.checkpoint,
        )


def open_run(recipe: Recipe, corpus: Corpus, data: Path, work: Path) -> Run:
    """A fresh run, or the one whose checkpoint lies in `work`.  Raises: CorpusError."""
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
    optimizer = make_optimizer(model, recipe)
    run = Run(
        recipe, corpus, tokenizer, texts, model, optimizer, 0, 0.0, [], work / "checkpoint.pt"
    )
    if run.checkpoint.exists():
        _restore(run)
    return run


def _restore(run: Run) -> None:
    saved = torch.load(run.checkpoint, weights_only=True)
    if saved["identity"] != identity(run.recipe, run.corpus):
        raise CorpusError(
            f"{run.checkpoint} belongs to another recipe or corpus; choose another --work folder"
        )
    steps = saved["steps"]
    decays_from = min(steps, run.recipe.steps) * (1 - DECAY_SHARE)
    if steps != run.recipe.steps and saved["step"] > decays_from:
        raise CorpusError(
            f"{run.checkpoint} is at step {saved['step']}, too far to change its {steps} steps; "
            f"continue with --steps {steps} or choose another --work folder"
        )
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.step, run.seconds = saved["step"], saved["seconds"]
    run.losses = [tuple(pair) for pair in saved["losses"]]
    torch.set_rng_state(saved["rng"])


def train(
    run: Run,
    *,
    until: int | None = None,
    save_every: int = 100,
    report: Callable[[int, float], None],
) -> None:
    """Train to `until` (default: the recipe's last step), saving on the way."""
    recipe = run.recipe
    names = [stream.name for stream in run.corpus.streams]
    streams = [encode(run.tokenizer, run.texts[name][0], seed=recipe.seed) for name in names]
    weights = np.array([stream.weight for stream in run.corpus.streams])
    weights = weights / weights.sum()
    run.model.train()
    recent: list[float] = []
    last = recipe.steps if until is None else min(until, recipe.steps)
    while run.step < last:
        began = time.perf_counter()
        loss = _step(run, draw(streams, weights, recipe, run.step))
        run.step += 1
        run.seconds += time.perf_counter() - began
        recent.append(loss)
        if run.step % LOSS_EVERY == 0 or run.step == last:
            run.losses.append((run.step, sum(recent) / len(recent)))
            recent.clear()
        report(run.step, loss)
        if run.step % save_every == 0 or run.step == last:
            run.save()


def _step(run: Run, window: np.ndarray) -> float:
    """One optimizer step on one drawn batch; the mean loss in nats."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.recipe, run.step)
    given, labels = pairs(window, run.recipe, run.step)
    count = int((labels != IGNORED).sum())
    total = 0.0
    for part, wanted in zip(
        given.split(run.recipe.micro), labels.split(run.recipe.micro), strict=True
    ):
        loss = loss_sum(run.model, part, wanted) / count
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total


# ---- measuring and writing out


@torch.no_grad()
def bits_per_byte(run: Run, texts: list[str]) -> float:
    """Held-out bits per byte; for BERT, over the bytes of masked tokens only."""
    recipe, tokens = run.recipe, encode(run.tokenizer, texts, seed=0)
    span = recipe.length + 1
    nats, size_bytes = 0.0, 0.0
    for number in range(min(HELD_OUT_WINDOWS, math.ceil(len(tokens.ids) / recipe.length))):
        window = tokens.ids[number * recipe.length :][:span][None]
        given, labels = pairs(window, recipe, number)
        kept = labels[labels != IGNORED]
        if not len(kept):
            continue
        nats += float(loss_sum(run.model, given, labels))
        size_bytes += len(kept) * tokens.size_bytes / len(tokens.ids)
    return nats / math.log(2) / size_bytes


def stored_weights(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Weights without the tied copies."""
    tied = {"lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def export(run: Run, out: Path) -> None:
    """Write the int8 weights, config, tokenizer and card; measures the weights as stored."""
    out.mkdir(parents=True, exist_ok=True)
    pack(stored_weights(run.model), out / WEIGHTS)
    run.model.load_state_dict(unpack((out / WEIGHTS).read_bytes()), strict=False)
    run.model.eval()
    config = json.loads(run.model.config.to_json_string()) | {
        "architectures": [type(run.model).__name__],
        "dtype": "float32",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if run.model.can_generate():
        run.model.generation_config.save_pretrained(out)
    save_tokenizer(run.recipe, run.tokenizer, out)
    write_sums(out)
    measured = Measured(
        steps=run.step,
        seconds=run.seconds,
        losses=run.losses,
        parameters=run.model.num_parameters(),
        held_out={name: bits_per_byte(run, held) for name, (_, held) in run.texts.items() if held},
        weights_bytes=(out / WEIGHTS).stat().st_size,
        weights_sha256=hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest(),
    )
    (out / "README.md").write_text(card(run.recipe, run.corpus, measured))


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 done, 1 refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, choices=sorted(RECIPES))
    parser.add_argument("--data", required=True, type=Path, help="folder of the corpus files")
    parser.add_argument("--out", required=True, type=Path, help="folder to write the model into")
    parser.add_argument("--work", required=True, type=Path, help="folder for checkpoints")
    parser.add_argument("--steps", type=int, help="a shorter or longer run than the recipe's")
    parser.add_argument("--until", type=int, help="stop at this step, to be continued")
    parser.add_argument(
        "--export-only", action="store_true", help="write out the checkpoint as it is"
    )
    args = parser.parse_args(argv)
    # A fixed number of threads keeps the order of additions, hence the bits.
    torch.set_num_threads(1)
    _keep_large_blocks()
    recipe = RECIPES[args.model]
    if args.steps:
        recipe = replace(recipe, steps=args.steps)
    console = Console(stderr=True)
    try:
        run = open_run(recipe, PUBLIC, args.data, args.work)
    except CorpusError as refusal:
        console.print(f"[red]{refusal}[/red]")
        return 1
    if not args.export_only:
        with _progress(console) as bar:
            task = bar.add_task(
                recipe.name, total=recipe.steps, completed=run.step, loss=float("nan")
            )
            train(
                run,
                until=args.until,
                report=lambda step, loss: bar.update(task, completed=step, loss=loss),
            )
    if args.export_only or run.step == recipe.steps:
        export(run, args.out)
    return 0


def _keep_large_blocks() -> None:
    # Otherwise glibc gives every batch of logits back, and the kernel zeroes the pages anew.
    mmap_threshold, trim_threshold, most = -3, -1, 2**31 - 1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, most)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
