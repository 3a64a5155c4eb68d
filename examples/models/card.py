"""Writes a model card from measurements.  Measures nothing itself."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
import torch
import transformers

from examples.data.corpus import PUBLIC_CLIENTS, Corpus
from examples.models.batches import MASK_SHARE
from examples.models.recipes import Recipe

CURVE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """What a finished or interrupted run can say about itself."""

    steps: int
    seconds: float
    losses: Sequence[tuple[int, float]]  # (step, mean training loss in nats since the row before)
    parameters: int
    held_out: Mapping[str, float]  # stream name -> bits per byte of the stored int8 weights
    weights_bytes: int
    weights_sha256: str


def card(recipe: Recipe, corpus: Corpus, measured: Measured) -> str:
    """The README.md of one model."""
    loader = _loader(recipe)
    clients = ", ".join(map(str, sorted(PUBLIC_CLIENTS)))
    held_out = ((name, f"{value:.3f}") for name, value in measured.held_out.items())
    curve = ((str(step), f"{loss:.3f}") for step, loss in _thinned(measured.losses))
    return f"""# {recipe.name}

Pretrained from scratch for Symbiont's examples. Small, and trained briefly: good for showing that
learning works, not for answering anybody's questions. `examples/pretrain.py` writes this card from
what it measured, with this command:

```sh
python examples/pretrain.py --model {recipe.name} --steps {recipe.steps} \\
  --data DATA --out examples/models/{recipe.name} --work WORK
```

To load it:

```python
from transformers import {loader}, AutoTokenizer
from examples.models import materialize

folder = materialize("{recipe.name}")
model = {loader}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

{_table(("", ""), _facts(recipe, measured))}

## Held-out bits per byte

{_unit_note(recipe)}
Measured on the stored int8 weights. `wikitext2-valid` is the official validation set; every other
row is the 1 % of that corpus that was held back (by the hash of the document).

{_table(("corpus", "bits per byte"), held_out)}

## Training loss

Mean over the steps since the row before, in nats per predicted token of the mixture.{_runs(recipe)}

{_table(("step", "loss"), curve)}

## Data

Shares are of training windows. Of Dolly only clients {clients} of its ten-client split are
read, without the category column, and no instruction that also occurs in another client: the other
clients are the demo's private and test data. The streams ending in `-kind` put the names of public
tasks under `Kind:`, in the demo's format.

{_table(("stream", "share", "source", "licence"), _sources(corpus))}

## Licence

Weights: CC BY-SA 4.0, since part of the data is share-alike. Code: the repository's LICENSE.
Biases, errors and offensive passages of the sources are in the model; it was not tuned for safety.
"""


def _facts(recipe: Recipe, measured: Measured) -> Iterable[tuple[str, str]]:
    runs = [*recipe.chain[:-1], replace(recipe, steps=measured.steps)]
    tokens = sum(run.steps * run.windows * run.length for run in runs)
    unfinished = "" if measured.steps == recipe.steps else f" of {recipe.steps}, unfinished"
    width = f"width {recipe.width}, inner {recipe.feed_forward}"
    heads = f"{recipe.heads} heads of {recipe.width // recipe.heads}"
    pieces = "lower-cased WordPiece" if recipe.masked else "byte-level BPE"
    speed = tokens / max(measured.seconds, 1e-9)
    yield "architecture", f"{recipe.family}, tied embeddings"
    yield "size", f"{width}, {recipe.layers} layers, {heads}"
    yield "parameters", f"{measured.parameters:,}"
    yield (
        "tokenizer",
        f"{pieces} of {recipe.vocabulary}; each of the demo's label words is one token",
    )
    yield "context", f"{recipe.context} tokens (trained on windows of {recipe.length})"
    yield "objective", f"masked tokens, {MASK_SHARE:.0%}" if recipe.masked else "next token"
    yield "tokens read", f"{tokens:,}"
    for number, run in enumerate(runs, 1):
        which = f"run {number} of {len(runs)}: " if len(runs) > 1 else ""
        steps = f"{run.steps}{unfinished if run is runs[-1] else ''}"
        yield f"{which}steps", f"{steps}, {run.windows} windows each"
        yield f"{which}optimizer", _optimizer(run)
        yield f"{which}schedule", _schedule(run)
        yield f"{which}seed", str(run.seed)
    yield "precision", "bfloat16 autocast in training; stored as int8 with one scale per row"
    yield "time", f"{measured.seconds / 60:.0f} minutes, {speed:,.0f} tokens/s, one thread"
    yield "machine", _machine()
    yield "versions", _versions()
    yield "stored weights", f"{measured.weights_bytes:,} bytes"
    yield "their sha256", f"`{measured.weights_sha256}`"


def _optimizer(recipe: Recipe) -> str:
    adamw = f"AdamW, lr {recipe.lr:g}, betas 0.9 and 0.98, weight decay 0.1"
    if recipe.muon_lr is None:
        return f"{adamw}; clip 1.0"
    muon = f"Muon for the layers' matrices, lr {recipe.muon_lr:g}, momentum 0.95, weight decay 0.1"
    return f"{muon}; for the rest {adamw}; clip 1.0"


def _schedule(recipe: Recipe) -> str:
    return (
        f"warm-up over {recipe.warm_up} steps, constant, "
        f"linear to zero over the last {recipe.decay:.0%} of the steps"
    )


def _loader(recipe: Recipe) -> str:
    return "AutoModelForMaskedLM" if recipe.masked else "AutoModelForCausalLM"


def _unit_note(recipe: Recipe) -> str:
    if recipe.masked:
        return (
            "For a masked model: bits per byte of the masked tokens given all the others, not\n"
            "comparable with the decoders' numbers."
        )
    return "Windows of the training length, no context carried over."


def _runs(recipe: Recipe) -> str:
    before = recipe.steps_before
    return f"\nThe first {before} steps are the earlier run's." if before else ""


def _versions() -> str:
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
    )


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {platform.system()} {platform.machine()}"
    )


def _thinned(losses: Sequence[tuple[int, float]]) -> Iterable[tuple[int, float]]:
    """At most CURVE_ROWS rows of equal width, each the mean of what it covers."""
    width = max(1, -(-len(losses) // CURVE_ROWS))
    for start in range(0, len(losses), width):
        part = losses[start : start + width]
        yield part[-1][0], sum(loss for _, loss in part) / len(part)


def _sources(corpus: Corpus) -> Iterable[tuple[str, str, str, str]]:
    files = {file.path: file for file in corpus.files}
    whole = sum(stream.weight for stream in corpus.streams)
    for stream in corpus.streams:
        file = files[stream.path]
        yield stream.name, f"{stream.weight / whole:.0%}", file.source, file.licence


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
