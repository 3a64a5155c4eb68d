"""One cell of `bench_eora.py`: a model compressed in one way, with every branch, measured.

Knows the reference models, the corpora and `compression`. Does not know the command line.
"""

import hashlib
import json
import lzma
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
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
from edge_sdk.train.lora import Adapter, LoraSpec, start_factors
from edge_sdk.train.text_task import TaskReader, label_probs
from edge_sdk.train.trainer import train_adapter
from examples.data.corpus import PUBLIC, passages, read_rows
from examples.learning.tasks import TASKS, rows_of
from examples.models import SUMS, cache_folder, materialize
from examples.models.batches import encode

ROOT = Path(__file__).resolve().parent
Row = dict[str, str]
LENGTH = 256
"""Tokens of a window, those of pretraining."""
HELD_OUT = 16
"""Windows measured per text: about 4,000 tokens; all arms read the same ones."""
MOST_BYTES = 6
"""Bytes of text read for each token wanted; the tokenizer makes one of about four."""
SKETCH = 64
"""Columns that a device sends instead of C in the rows "one pass, sketch"."""
RANK, ALPHA = 8, 16.0
"""Of the adapter that learns the task before it is merged."""
TASK_STEPS = {"slm-a": 300, "llm": 150}
SEED = 20261121

FIELDS = (
    "model", "weights", "branch", "rank", "bits_per_weight", "wikitext2_bpb", "wikitext2_se",
    "requests_bpb", "recovered",
)  # fmt: skip
TASK_FIELDS = ("model", "weights", "branch", "rank", "bits_per_weight", "accuracy", "nats")
SPEED_FIELDS = ("model", "rank", "bundle_kb", "branch_kb", "ms_per_token", "times_base")


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
        texts = (self.wikitext("train"), self.own_texts)
        parts = [windows(self.tokenizer, text, half)[0][:, :-1] for text in texts]
        return list(torch.cat(parts).split(8))

    own_texts: Sequence[str] = ()

    def wikitext(self, part: str) -> list[str]:
        """Passages of WikiText-2."""
        file = next(f for f in PUBLIC.files if f.path == f"lm/wikitext2.{part}.txt.xz")
        return [text for _, text in passages(read_rows(self.settings.data, file))]

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


def linears(model: Any) -> list[str]:
    """The linear layers of the model's blocks."""
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, torch.nn.Linear) and ".layers." in n]


def load(folder: Path) -> Any:
    """The model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def windows(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> tuple[torch.Tensor, float]:
    """`count` windows (count, LENGTH + 1) of texts in a seeded order; their bytes per token."""
    order, taken, size = np.random.default_rng(SEED).permutation(len(texts)), [], 0
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


def questions(settings: Settings, part: str) -> list[tuple[str, str]]:
    """TREC's questions with their labels."""
    task = TASKS["trec"]
    file = task.train if part == "train" else task.test
    made = (task.read(row) for row in rows_of(settings.data, file))
    return [example for example in made if example is not None]


def train_task(name: str, settings: Settings) -> Path:
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
        *(adapter, reader, questions(settings, "train")),
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


def task_scores(lab: Lab, examples: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """(accuracy, nats per label)."""
    reader = TaskReader.from_folder(TASKS["trec"].text_task(), lab.folder)
    texts, labels = zip(*examples, strict=True)
    probs = label_probs(lab.model, reader, texts)
    wanted = torch.tensor([reader.label_index(label) for label in labels])
    right = (probs.argmax(1) == wanted).float().mean()
    return float(right), float(-probs[torch.arange(len(wanted)), wanted].log().mean())


# ---- a cell

Found = dict[tuple[str, int], Any]


def text_cell(name: str, weights: str, settings: Settings) -> list[Row]:
    """Bits per byte of one model under one compression, without and with every branch."""
    lab = Lab(name, SCHEMES[weights], settings)
    lab.own_texts = requests("dolly_public.jsonl.xz")
    texts = (lab.wikitext("valid"), requests("dolly_devices.jsonl.xz", "heldout"))
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
    lab = Lab(name, SCHEMES[weights], settings, train_task(name, settings))
    task = TASKS["trec"]
    train, test = (questions(settings, part) for part in ("train", "test"))
    prompt = task.text_task().prompt
    lab.own_texts = [f"{prompt.format(text=x)} {task.labels[label]}\n" for x, label in train]
    found = _every_arm(lab, lambda: task_scores(lab, test), task=True)
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


# ---- size and latency, in the runtime that devices use


def speed(name: str, ranks: Sequence[int], *, tokens: int = 48, repeats: int = 7) -> list[Row]:
    """Milliseconds per generated token without and with a branch; two threads, best of repeats."""
    import onnxruntime_genai as og

    from exporters.adapter import write_adapter
    from exporters.bundle import read_manifest
    from exporters.slm import export_slm

    folder = materialize(name)
    bundle = cache_folder().parent / "bundles" / folder.name
    if not bundle.is_dir():
        export_slm(folder, bundle, family=name, release="base")
    slots = read_manifest(bundle).adapter_slots
    model = og.Model(str(bundle))
    adapters, rng, sizes = og.Adapters(model), np.random.default_rng(SEED), {0: 0}
    with tempfile.TemporaryDirectory() as scratch:
        for rank in ranks:
            pairs = {
                n: (rng.normal(0, 0.01, (rank, i)), rng.normal(0, 0.01, (o, rank)))
                for n, (o, i) in slots.items()
            }
            path = Path(scratch) / f"{rank}.onnx_adapter"
            write_adapter(as_factors(pairs), rank=rank, alpha=rank, slots=slots, path=path)
            adapters.load(str(path), str(rank))
            sizes[rank] = path.stat().st_size
        best = dict.fromkeys(sizes, math.inf)
        for _ in range(repeats):
            for rank in sizes:  # alternating, so that a busy spell meets all of them
                best[rank] = min(best[rank], _token_ms(og, model, adapters, rank, tokens))
    stored = sum(path.stat().st_size for path in bundle.iterdir())
    return [
        {
            "model": name,
            "rank": str(rank),
            "bundle_kb": f"{stored / 1000:.0f}",
            "branch_kb": f"{sizes[rank] / 1000:.0f}",
            "ms_per_token": f"{best[rank]:.3f}",
            "times_base": f"{best[rank] / best[0]:.2f}",
        }
        for rank in sizes
    ]


def _token_ms(og: Any, model: Any, adapters: Any, rank: int, tokens: int) -> float:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=32 + tokens, min_length=32 + tokens, do_sample=False)
    generator = og.Generator(model, params)
    if rank:
        generator.set_active_adapter(adapters, str(rank))
    generator.append_tokens(np.arange(1, 32, dtype=np.int32))
    generator.generate_next_token()
    begun = time.perf_counter()
    for _ in range(tokens - 1):
        generator.generate_next_token()
    return 1000 * (time.perf_counter() - begun) / (tokens - 1)
