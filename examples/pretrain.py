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
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.data.corpus import PUBLIC, CorpusError
from examples.models import WEIGHTS, pack, unpack, write_sums
from examples.models.batches import IGNORED, draw, encode, pairs
from examples.models.card import Measured, card
from examples.models.recipes import RECIPES
from examples.models.run import Run, open_run
from examples.models.tokenizer import save_tokenizer

HELD_OUT_WINDOWS = 60  # per corpus: about 15 thousand tokens
LOSS_EVERY = 50


def loss_sum(model: torch.nn.Module, given: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats, in bfloat16: about three times float32's speed on AVX-512."""
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(model, transformers.ModernBertForMaskedLM):
            # Scoring the gaps alone saves half of the work.
            gaps = labels != IGNORED
            hidden = model.model(input_ids=given).last_hidden_state[gaps]  # (n_gaps, width)
            logits, wanted = model.decoder(model.head(hidden)), labels[gaps]
        else:
            logits = model(input_ids=given, use_cache=False).logits.flatten(0, 1)
            wanted = labels.flatten()
    return functional.cross_entropy(logits.float(), wanted, reduction="sum")


def train(
    run: Run,
    *,
    until: int | None = None,
    save_every: int = 100,
    report: Callable[[int, float], None],
) -> None:
    """Train to `until` (default: the recipe's last step), saving on the way."""
    recipe = run.recipe
    last = recipe.steps if until is None else min(until, recipe.steps)
    if run.step >= last:
        return
    names = [stream.name for stream in run.corpus.streams]
    streams = [encode(run.tokenizer, run.texts[name][0], seed=recipe.seed) for name in names]
    weights = np.array([stream.weight for stream in run.corpus.streams])
    weights = weights / weights.sum()
    run.model.train()
    recent: list[float] = []
    while run.step < last:
        began = time.perf_counter()
        loss = _step(run, draw(streams, weights, recipe, run.step))
        run.step += 1
        run.seconds += time.perf_counter() - began
        recent.append(loss)
        if run.step % LOSS_EVERY == 0 or run.step == last:
            run.losses.append((recipe.steps_before + run.step, sum(recent) / len(recent)))
            recent.clear()
        report(run.step, loss)
        if run.step % save_every == 0 or run.step == last:
            run.save()


def _step(run: Run, window: np.ndarray) -> float:
    """One optimizer step on one drawn batch; the mean loss in nats."""
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
    run.optimizers.step(run.step)
    return total


# ---- measuring and writing out


@torch.no_grad()
def bits_per_byte(run: Run, texts: list[str]) -> float:
    """Held-out bits per byte; for a masked model, over the bytes of masked tokens only."""
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
    tied = {"lm_head.weight", "decoder.weight"}
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
        for earlier in () if args.export_only else recipe.chain[:-1]:
            _advance(open_run(earlier, PUBLIC, args.data, args.work), None, console)
        run = open_run(recipe, PUBLIC, args.data, args.work)
    except CorpusError as refusal:
        console.print(f"[red]{refusal}[/red]")
        return 1
    if not args.export_only:
        _advance(run, args.until, console)
    if args.export_only or run.step == recipe.steps:
        export(run, args.out)
    return 0


def _advance(run: Run, until: int | None, console: Console) -> None:
    """Train with a progress bar."""
    name, steps = run.recipe.name, run.recipe.steps
    with _progress(console) as bar:
        task = bar.add_task(name, total=steps, completed=run.step, loss=float("nan"))
        train(
            run, until=until, report=lambda step, loss: bar.update(task, completed=step, loss=loss)
        )


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
