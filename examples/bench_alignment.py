"""How fast vocabularies and texts are aligned, and what the loss on sparse targets costs.

    python -m examples.bench_alignment
    python -m examples.bench_alignment --source llama.tokenizer.model.xz --base gpt2.encoder.json.xz

Knows two ways to do the same: the product's (`edge_sdk/algorithms`, `edge_sdk/train/teaching.py`)
and a plain reference written here in the manner of published code: a Python loop over all pairs of
tokens, over all cells of a warping matrix, and over all entries of a dense target. The reference's
distances come from the same C library, so loops are compared, not Levenshtein implementations.
Where the reference would take hours it does a part, and its seconds are scaled (marked "~"). On
that part both must give the same answer, or the benchmark fails.

Without files the vocabularies are those of the example models slm-a and slm-b. A vocabulary file is
a tokenizer.json, a {"token": id} json of byte-level tokens, a WordPiece vocab.txt or a
SentencePiece .model, each also as .xz. `--most` keeps the first tokens of both. Seconds are of one
core (process time), so that what else the machine does counts little.
"""

import argparse
import json
import lzma
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer

from edge_sdk.algorithms.alignment import carry, dtw, greedy
from edge_sdk.algorithms.logit_rows import LogitTable, Places
from edge_sdk.algorithms.vocabulary import (
    NONE,
    Vocabulary,
    byte_level,
    mined_table,
    sentence_piece,
    word_piece,
)
from edge_sdk.train.lora import Adapter, LoraSpec
from edge_sdk.train.teaching import mixed_loss
from edge_sdk.train.text_task import logits_at

HERE = Path(__file__).resolve().parent
TEXTS = HERE / "data" / "dolly_public.jsonl.xz"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REPEATS = 15


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table; `scaled`: the reference did a part of the work."""

    what: str
    ours_s: float
    reference_s: float
    scaled: bool = False


# --- vocabularies -----------------------------------------------------------------------------


def vocabulary_of(path: Path) -> Vocabulary:
    """The vocabulary in a file of one of the kinds above."""
    name = path.name.removesuffix(".xz")
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    if name.endswith(".model"):
        return Vocabulary(tuple(sentence_piece(piece) for piece in pieces_of(data)))
    if name.endswith(".txt"):
        lines = data.decode().splitlines()
        return Vocabulary(tuple(word_piece(line) for line in lines if line))
    found = json.loads(data)
    if isinstance(found.get("model"), dict):  # "model" is a word of GPT-2's too
        return Vocabulary.of(Tokenizer.from_str(data.decode()))
    return Vocabulary(tuple(byte_level(token) for token in sorted(found, key=found.__getitem__)))


def pieces_of(data: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model: field 1 of its message, of each the field 1."""
    at = 0
    while at < len(data) and data[at] == 0x0A:
        size, at = _varint(data, at + 1)
        length, start = _varint(data, at + 1)
        yield data[start : start + length].decode()
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


@cache
def first_ids(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The lowest id of every surface."""
    return {word: i for i, word in reversed(list(enumerate(vocabulary.surfaces))) if word}


def tokens_of(vocabulary: Vocabulary, text: bytes, most: int) -> list[int]:
    """The text cut into the longest tokens that fit, from its start on, at most `most`."""
    ids = first_ids(vocabulary)
    longest = max(map(len, ids))
    found: list[int] = []
    at = 0
    while at < len(text) and len(found) < most:
        size = next((n for n in range(longest, 0, -1) if text[at : at + n] in ids), 0)
        if size:
            found.append(ids[text[at : at + size]])
        at += max(1, size)
    return found


def texts(n: int, tokens: int) -> list[bytes]:
    """n pieces of the example texts, each long enough for `tokens` tokens."""
    with lzma.open(TEXTS, "rt", encoding="utf-8") as file:
        whole = " ".join(json.loads(line)["text"] for line in file).encode()
    starts = np.random.default_rng(0).integers(0, len(whole) - 8 * tokens, n)
    return [whole[start : start + 8 * tokens] for start in starts.tolist()]


# --- the reference ----------------------------------------------------------------------------


def reference_table(source: Vocabulary, base: Vocabulary, rows: Sequence[int]) -> list[int]:
    """MinED of some source tokens, by looking at every base token."""
    ids: dict[bytes, int] = {}
    for i, word in enumerate(base.surfaces):
        ids.setdefault(word, i)
    table = []
    for i in rows:
        word = source.surfaces[i]
        if word in ids:
            table.append(ids[word])
            continue
        best, least = b"", len(word) + 1_000
        for other in ids:
            far = Levenshtein.distance(word, other)
            if other and (far < least or (far == least and other < best)):
                best, least = other, far
        table.append(ids[best])
    return table


def reference_match(base: Sequence[str], source: Sequence[str]) -> list[int]:
    """The single match of every base token on the cheapest path, cell by cell."""
    far = 1 << 30
    M = [[far] * len(source) for _ in base]
    for i, here in enumerate(base):
        for j, there in enumerate(source):
            ways = [
                M[i - 1][j - 1] if i and j else far,
                M[i - 1][j] if i else far,
                M[i][j - 1] if j else far,
            ]
            before = 0 if i == j == 0 else min(ways)
            M[i][j] = before + Levenshtein.distance(here, there)
    matches: list[list[int]] = [[] for _ in base]
    i, j = len(base) - 1, len(source) - 1
    while True:
        matches[i].append(j)
        if i == j == 0:
            break
        ways = [
            (M[i - 1][j - 1] if i and j else far, i - 1, j - 1),
            (M[i - 1][j] if i else far, i - 1, j),
            (M[i][j - 1] if j else far, i, j - 1),
        ]
        _, i, j = min(ways, key=lambda way: way[0])
    return [row[0] if len(row) == 1 else NONE for row in matches]


def reference_loss(
    logits: torch.Tensor, truth: torch.Tensor, ids: torch.Tensor, mass: torch.Tensor
) -> torch.Tensor:
    """lambda CE and (1 - lambda) CE to a dense target filled entry by entry."""
    dense = torch.zeros_like(logits)
    for row in range(len(logits)):
        for token, weight in zip(ids[row].tolist(), mass[row].tolist(), strict=True):
            dense[row, token] = weight
    dense = dense / dense.sum(dim=1, keepdim=True)
    hard = torch.nn.functional.cross_entropy(logits, truth)
    return 0.9 * hard + 0.1 * torch.nn.functional.cross_entropy(logits, dense)


# --- measuring --------------------------------------------------------------------------------


def seconds(act: Callable[[], object]) -> float:
    """Core seconds of one call."""
    began = time.process_time()
    act()
    return time.process_time() - began


def table_line(source: Vocabulary, base: Vocabulary, part: int) -> Line:
    """MinED over the whole vocabulary."""
    began = time.process_time()
    table = mined_table(source, base)
    ours = time.process_time() - began
    rows = np.random.default_rng(1).permutation(len(source))[:part].tolist()
    began = time.process_time()
    same = reference_table(source, base, rows) == table[rows].tolist()
    reference = (time.process_time() - began) * len(source) / len(rows)
    if not same:
        raise SystemExit("the tables differ")
    return Line(f"MinED table, {len(source)} x {len(base)} tokens", ours, reference, True)


def text_lines(source: Vocabulary, base: Vocabulary, n: int, tokens: int, part: int) -> list[Line]:
    """Alignment of n texts, and the rows carried across."""
    raw = texts(n, tokens)
    here, there = (
        Places.of([tokens_of(v, t, tokens) for t in raw], [0] * n) for v in (base, source)
    )
    match = np.zeros(0, np.int64)

    def align() -> None:
        nonlocal match
        match = dtw(here, base, there, source)

    ours = seconds(align)
    began = time.process_time()
    for text in range(part):
        a, b = (p.tokens[p.starts[text] : p.starts[text + 1]].tolist() for p in (here, there))
        found = reference_match([base.bare[i] for i in a], [source.bare[j] for j in b])
        mine = match[here.starts[text] : here.starts[text + 1]]
        if np.where(mine == NONE, NONE, mine - there.starts[text]).tolist() != found:
            raise SystemExit(f"the alignments of text {text} differ")
    reference = (time.process_time() - began) * n / part
    table = mined_table(source, base)
    said = rows_about(there, len(source), 16)
    carried = seconds(lambda: carry(here, said, table, match))
    share = float((match != NONE).mean())
    name = f"{n} texts of {tokens} tokens"
    return [
        Line(f"DTW, {name} ({share:.0%} matched one to one)", ours, reference, True),
        Line(f"greedy, {name}", seconds(lambda: greedy(here, base, there, source)), float("nan")),
        Line(f"carry rows of 16, {name}", carried, float("nan")),
    ]


def rows_about(places: Places, vocabulary: int, kept: int) -> LogitTable:
    """Some rows in which the truth comes first."""
    rng = np.random.default_rng(2)
    n = len(places.tokens)
    ids = (places.tokens[:, None] + np.arange(kept) * 17) % vocabulary
    logps = np.sort(np.log(rng.dirichlet(np.ones(kept + 1), n)[:, :kept]), axis=1)[:, ::-1]
    return LogitTable(
        places, logps[:, 0].astype("f4"), ids.astype(np.int32), logps.astype(np.float16)
    )


def loss_lines(rows: int, tokens: int, kept: int) -> list[Line]:
    """A training step of slm-a: forward, loss, backward."""
    from transformers import AutoModelForCausalLM

    from examples.models import materialize

    model = AutoModelForCausalLM.from_pretrained(materialize("slm-a"))
    Adapter(model, LoraSpec(8, 16.0, LAYERS))
    rng = np.random.default_rng(3)
    V = int(model.config.vocab_size)
    ids = torch.from_numpy(rng.integers(1, V, (rows, tokens)))
    where, column = (
        torch.from_numpy(x) for x in np.divmod(np.arange(rows * (tokens - 1)), tokens - 1)
    )
    n = len(where)
    truth = ids[where, column + 1]
    soft = torch.from_numpy(np.stack([rng.choice(V, kept, replace=False) for _ in range(n)]))
    mass, taught = torch.full((n, kept), 0.9 / kept), torch.full((n,), 0.1)

    def step(loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def act() -> None:
            loss(logits_at(model, ids, where, column)).backward()

        return act

    ways = {
        "plain": step(lambda z: torch.nn.functional.cross_entropy(z, truth)),
        "sparse": step(lambda z: mixed_loss(z, truth, soft, mass, 0.9, taught).mean()),
        "dense": step(lambda z: reference_loss(z, truth, soft, mass)),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(REPEATS + 1):  # in turns, so that noise falls on all; the first not counted
        for name, act in ways.items():
            if name != "dense" or turn <= 3:
                took = seconds(act)
                if turn:
                    taken[name].append(took)
    least = {name: min(found) for name, found in taken.items()}
    shape = f"{rows} x {tokens} tokens, k = {kept}, slm-a"
    return [
        Line(f"training step, {shape}", least["sparse"], least["dense"]),
        Line("the same step with plain cross-entropy", least["plain"], float("nan")),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", type=Path, default=HERE / "models" / "slm-b" / "tokenizer.json")
    add("--base", type=Path, default=HERE / "models" / "slm-a" / "tokenizer.json")
    add("--most", type=int, default=32_000, help="tokens of each vocabulary, the first ones")
    add("--texts", type=int, default=1000)
    add("--tokens", type=int, default=128)
    add("--part", type=int, default=5, help="texts and, times ten, tokens for the reference")
    add("--batch", type=int, default=8, help="rows of the training step; 0 leaves it out")
    add("--json", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    source, base = (
        Vocabulary(found.surfaces[: options.most])
        for found in (vocabulary_of(options.source), vocabulary_of(options.base))
    )
    lines = [table_line(source, base, 10 * options.part)]
    lines += text_lines(source, base, options.texts, options.tokens, options.part)
    if options.batch:
        lines += loss_lines(options.batch, 64, 16)
    if options.json:
        print(json.dumps([[li.what, li.ours_s, li.reference_s, li.scaled] for li in lines]))
        return 0
    print(f"{'core seconds':64} {'ours':>10} {'reference':>12}")
    for line in lines:
        other = "" if np.isnan(line.reference_s) else f"{'~' * line.scaled}{line.reference_s:.3f}"
        print(f"{line.what:64} {line.ours_s:10.3f} {other:>12}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
