"""What `bench_eora.py` reads and measures: windows of text, bits per byte, TREC.

Knows the corpora, and how to ask a model about them. Does not know compression or branches.
"""

import hashlib
import json
import lzma
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer

from edge_sdk.train.lora import Adapter, LoraSpec, start_factors
from edge_sdk.train.text_task import TaskReader, label_probs
from edge_sdk.train.trainer import train_adapter
from examples.data.corpus import PUBLIC, passages, read_rows
from examples.learning.tasks import TASKS, rows_of
from examples.models import SUMS, cache_folder, materialize
from examples.models.batches import encode

ROOT = Path(__file__).resolve().parent
F64 = npt.NDArray[np.float64]

LENGTH = 256
"""Tokens of a window, those of pretraining."""
MOST_BYTES = 6
"""Bytes of text read for each token wanted; the tokenizer makes one of about four."""
RANK, ALPHA = 8, 16.0
"""Of the adapter that learns the task before it is merged."""
TASK_STEPS = {"slm-a": 300, "llm": 150}
SEED = 20261121


def linears(model: Any) -> list[str]:
    """The linear layers of the model's blocks."""
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, torch.nn.Linear) and ".layers." in n]


def load(folder: Path) -> Any:
    """The model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def wikitext(data: Path, part: str) -> list[str]:
    """Passages of WikiText-2 ("train" or "valid") in the folder `data`.  Raises: CorpusError."""
    file = next(f for f in PUBLIC.files if f.path == f"lm/wikitext2.{part}.txt.xz")
    return [text for _, text in passages(read_rows(data, file))]


def windows(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> tuple[torch.Tensor, float]:
    """`count` windows (count, LENGTH + 1) of texts in a seeded order; their bytes per token."""
    order = np.random.default_rng(SEED).permutation(len(texts))
    taken: list[str] = []
    size = 0
    while len(taken) < len(order) and size < count * LENGTH * MOST_BYTES:
        taken.append(texts[order[len(taken)]])
        size += len(taken[-1].encode())
    tokens = encode(tokenizer, taken, seed=SEED)
    count = min(count, (len(tokens.ids) - 1) // LENGTH)
    rows = [tokens.ids[i * LENGTH :][: LENGTH + 1] for i in range(count)]
    ids = torch.from_numpy(np.stack(rows)).long()
    return ids, tokens.size_bytes / len(tokens.ids)


def requests(path: str, split: str | None = None) -> list[str]:
    """The demo's requests in the models' format."""
    with lzma.open(ROOT / "data" / path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    kept = [row["text"] for row in rows if split is None or row["split"] == split]
    return [f"Request: {text}\n" for text in kept]


@torch.no_grad()
def bits_per_byte(model: Any, ids: torch.Tensor, bytes_per_token: float) -> F64:
    """Bits per byte of each window."""
    found = []
    for part in ids.split(4):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
        )
        found.append(loss.view(len(part), -1).mean(1))
    return torch.cat(found).double().numpy() / math.log(2) / bytes_per_token


# ---- the task


def questions(data: Path, part: str) -> list[tuple[str, str]]:
    """TREC's questions with their labels."""
    task = TASKS["trec"]
    file = task.train if part == "train" else task.test
    made = (task.read(row) for row in rows_of(data, file))
    return [example for example in made if example is not None]


def train_task(name: str, data: Path) -> Path:
    """The weights of model `name` trained on TREC, merged; made once and kept in the cache."""
    sums = (ROOT / "models" / name / SUMS).read_bytes()
    settled = repr((RANK, ALPHA, TASK_STEPS[name], SEED)).encode()
    key = hashlib.sha256(sums + settled).hexdigest()
    path = cache_folder().parent / "eora" / f"{name}-trec-{key[:16]}.safetensors"
    if path.is_file():
        return path
    torch.set_num_threads(1)
    folder = materialize(name)
    model = load(folder)
    kept = {n: model.get_submodule(n).weight.detach().clone() for n in linears(model)}
    targets = tuple(sorted({n.rpartition(".")[2] for n in kept}))
    adapter = Adapter(model, LoraSpec(RANK, ALPHA, targets))
    adapter.load(start_factors(adapter.layout, SEED))
    reader = TaskReader.from_folder(TASKS["trec"].text_task(), folder)
    found = train_adapter(
        *(adapter, reader, questions(data, "train")),
        steps=TASK_STEPS[name], batch=8, lr=3e-3, seed=SEED,
    )  # fmt: skip
    for n, W in kept.items():
        A, B = (torch.from_numpy(found.factors[f"{n}.lora_{side}"]) for side in "AB")
        W += adapter.spec.scale * (B @ A)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as draft:
        save_file({f"{n}.weight": W for n, W in kept.items()}, draft.name)
    Path(draft.name).rename(path)
    return path


def task_scores(
    model: Any, folder: Path, examples: Sequence[tuple[str, str]]
) -> tuple[float, float]:
    """(accuracy, nats per label) of a model whose tokenizer is in `folder`."""
    reader = TaskReader.from_folder(TASKS["trec"].text_task(), folder)
    texts, labels = zip(*examples, strict=True)
    probs = label_probs(model, reader, texts)
    wanted = torch.tensor([reader.label_index(label) for label in labels])
    right = (probs.argmax(1) == wanted).float().mean()
    return float(right), float(-probs[torch.arange(len(wanted)), wanted].log().mean())
