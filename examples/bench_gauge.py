"""Coordinates that stay comparable: ways to add up LoRA factors, each with and without a codec.

    python examples/bench_gauge.py            # seven ways, three seeds, about an hour of one core

Knows how well one round's change compares with the next. Does not know the work, the clients or the
codecs: see `examples/codec_bench/`, whose `lm` this runs (eight clients, 40 rounds).

The ways are in `examples/codec_bench/ways.py`. What a device owes stays in its coordinates, however
these were turned; the bytes are equal for all ways, also where half of the values is sent.

Finished runs are in the CSV and are not computed again.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from coordinator.aggregate import A_SUFFIX, B_SUFFIX, slots
from examples.codec_bench import kinds
from examples.codec_bench.fleet import CLIENTS, F32, Fleet, Task
from examples.codec_bench.methods import METHODS, UNCOMPRESSED
from examples.codec_bench.runs import Uplink
from examples.codec_bench.sessions import TAG_BYTES, Plan, flat, named
from examples.codec_bench.ways import WAYS, Refactor, Thin, Trained
from examples.data.corpus import CorpusError
from examples.models import ModelError
from examples.result_files import replace_text

T = TypeVar("T")
Factors = Mapping[str, F32]

ROOT = Path(__file__).resolve().parent
WORK = "lm"
ROUNDS, STEPS, SEEDS = 40, kinds.LM.steps, (1, 2, 3)
CODECS = ((UNCOMPRESSED, 0), *((name, r) for r in (100, 300) for name in ("dead-zone", "symbiont")))
"""Method, and times fewer bytes than A and B in float32."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run.

    Attributes:
        steps: of a client in a round.
        asked: times fewer bytes asked for; ratio: had, over A and B in float32, tag included.
        before, after: held-out loss in nats.
        cosine: of what is decoded against the update with what was owed, mean over all updates.
        coordinates, product: cosine of a round's change with the one before, mean over rounds: in
            the coordinates that travel, and of B A itself, which no gauge turns.
        off: squared distance of the new B A from the mean of the clients', over the squared change
            of that mean; mean over rounds.
    """

    seed: int
    way: str
    codec: str
    asked: int
    rounds: int
    steps: int
    ratio: float
    bytes: float
    before: float
    after: float
    cosine: float
    coordinates: float
    product: float
    off: float
    core_s: float

    @property
    def run(self) -> tuple[int, int, int]:
        """What rows must share to be compared."""
        return self.steps, self.rounds, self.seed

    @property
    def unit(self) -> tuple[tuple[int, int, int], str, str, int]:
        """What was asked for."""
        return self.run, self.way, self.codec, self.asked

    @property
    def drop(self) -> float:
        """How far the held-out loss fell."""
        return self.before - self.after


def measure(
    task: Task, name: str, codec: str, asked: int, *, seed: int, rounds: int, steps: int
) -> Row:
    """Run one way with one codec."""
    began, way = time.process_time(), WAYS[name]
    whole = sum(int(np.prod(shape)) for shape in task.shapes.values())  # coordinates of A and B
    trained = Trained(task, way, seed, steps)
    fleet = Fleet(trained, seed)
    plan = Plan(trained.shapes, asked * fleet.size / whole, rounds, CLIENTS, seed)
    uplink = Uplink(plan, METHODS[codec].make(plan))
    before, moves, offs = fleet.held_out_loss(), [], []
    for round_ in range(rounds):
        old = fleet.adapter
        said = [
            named(uplink.send(client, round_, update), plan)
            for client, update in enumerate(fleet.local_updates(round_))
        ]
        held = trained.fixed | old
        brought = [trained.fixed | {n: old[n] + one[n] for n in old} for one in said]
        average = {n: np.mean([one[n] for one in said], axis=0) for n in old}
        change = average if way.refactor is None else _refactored(way.refactor, held, brought)
        fleet.apply(change)
        uplink.session.end_round(change)
        new = trained.fixed | fleet.adapter
        moves.append((flat(change, plan), products([(1.0, new), (-1.0, held)])))
        offs.append(_off(new, brought, held))
    size = mean(uplink.sizes) + TAG_BYTES
    return Row(
        seed=seed,
        way=name,
        codec=codec,
        asked=asked,
        rounds=rounds,
        steps=steps,
        ratio=4 * whole / size,
        bytes=size,
        before=before,
        after=fleet.held_out_loss(),
        cosine=mean(uplink.cosines),
        coordinates=_consecutive([x for x, _ in moves], lambda x, y: float(x @ y)),
        product=_consecutive([x for _, x in moves], inner),
        off=mean(offs),
        core_s=time.process_time() - began,
    )


def _refactored(refactor: Refactor, old: Factors, brought: Sequence[Factors]) -> Factors:
    """What turns the old factors into those of the mean of products."""
    change: dict[str, F32] = {}
    for slot, (left, right) in zip(slots(old), products(_shares(brought)), strict=True):
        A, B = (old[slot + end].astype(np.float64) for end in (A_SUFFIX, B_SUFFIX))
        B_new, A_new = refactor(left, right, A, B)
        change[slot + A_SUFFIX] = (A_new - A).astype(np.float32)
        change[slot + B_SUFFIX] = (B_new - B).astype(np.float32)
    return change


def products(sum_of: Iterable[tuple[float, Factors]]) -> list[Thin]:
    """A weighted sum of B A for every adapted layer, thin."""
    parts = list(sum_of)
    return [
        (
            np.concatenate([w * f[s + B_SUFFIX].astype(np.float64) for w, f in parts], axis=1),
            np.concatenate([f[s + A_SUFFIX].astype(np.float64) for _, f in parts], axis=0),
        )
        for s in slots(parts[0][1])
    ]


def inner(one: Sequence[Thin], other: Sequence[Thin]) -> float:
    """Sum of the inner products of two lists of matrices."""
    pairs = zip(one, other, strict=True)
    return float(sum(np.sum((p.T @ u) * (q @ v.T)) for (p, q), (u, v) in pairs))


def _shares(brought: Sequence[Factors]) -> list[tuple[float, Factors]]:
    return [(1 / len(brought), factors) for factors in brought]


def _off(new: Factors, brought: Sequence[Factors], old: Factors) -> float:
    missed = products([(-1.0, new), *_shares(brought)])
    meant = products([(-1.0, old), *_shares(brought)])
    energy = inner(meant, meant)
    return max(inner(missed, missed), 0.0) / energy if energy > 0 else 0.0


def _consecutive(moves: Sequence[T], dot: Callable[[T, T], float]) -> float:
    """Mean cosine of each move with the one before; 0 where there is only one."""
    found = [_cosine(dot(x, y), dot(x, x), dot(y, y)) for x, y in pairwise(moves)]
    return mean(found) if found else 0.0


def _cosine(dot: Any, one: Any, other: Any) -> float:
    size = float(one) * float(other)
    return float(dot) / size**0.5 if size > 0 else 0.0


# --- results ----------------------------------------------------------------------------------

_KINDS: dict[str, Callable[[str], Any]] = Row.__annotations__  # int, float or str
COLUMNS = [*_KINDS, "kept_own", "kept_best"]


def kept(row: Row, rows: Iterable[Row]) -> tuple[float, float]:
    """The row's drop over that of its way uncompressed, and over the best way's uncompressed.

    NaN where those runs are missing.
    """
    drops = {
        other.way: other.drop
        for other in rows
        if (other.codec, other.run) == (UNCOMPRESSED, row.run)
    }
    own, best = drops.get(row.way, float("nan")), max(drops.values(), default=float("nan"))
    return row.drop / own, row.drop / best


def load(path: Path) -> list[Row]:
    """The rows of an earlier run; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [Row(**{name: kind(line[name]) for name, kind in _KINDS.items()}) for line in lines]


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(rows, key=lambda row: row.unit):
        values = [*dataclasses.astuple(row), *kept(row, rows)]
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
    replace_text(path, text.getvalue())


HEAD = (
    "way", "codec", "times fewer bytes", "loss", "drop", "kept of its own", "kept of the best",
    "cosine", "consecutive: coordinates", "product", "off",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown: means over seeds, the spread of seeds behind what is kept of the best."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for codec, asked in CODECS:
        for way in WAYS:
            found = [r for r in rows if (r.way, r.codec, r.asked) == (way, codec, asked)]
            if found:
                lines.append("| " + " | ".join(_cells(found, rows)) + " |")
    return "\n".join(lines)


def _cells(found: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    shares = [kept(row, rows) for row in found]
    best = [100 * share for _, share in shares]
    return [
        found[0].way,
        found[0].codec,
        f"{mean(r.ratio for r in found):.4g}",
        f"{mean(r.after for r in found):.4f}",
        f"{mean(r.drop for r in found):.4f}",
        f"{100 * mean(own for own, _ in shares):.1f} %",
        f"{mean(best):.1f} % ({min(best):.1f} to {max(best):.1f})",
        f"{mean(r.cosine for r in found):.3f}",
        f"{mean(r.coordinates for r in found):.3f}",
        f"{mean(r.product for r in found):.3f}",
        f"{mean(r.off for r in found):.2g}",
    ]


# --- command line -----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 done, 1 refused."""
    args = parse(argv)
    try:
        rows = measured(args)
    except (CorpusError, ModelError) as refusal:
        print(refusal, file=sys.stderr)
        return 1
    shown = [row for row in rows if row.run in runs(args)]
    seeds = len({row.seed for row in shown})
    print(f"\n{WORK}, {args.rounds} rounds of {args.steps} steps, mean of up to {seeds} seeds\n")
    print(table(shown))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent.parent / "shared" / "data", help="the corpora")
    add("--unverified", action="store_true", help="take files whatever their checksums")
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--steps", type=int, default=STEPS, help=f"of a client in a round; default: {STEPS}")
    add("--seeds", type=int, nargs="+", default=list(SEEDS), help=f"default: {SEEDS}")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    codecs = list(dict.fromkeys(codec for codec, _ in CODECS))
    add("--codecs", nargs="+", choices=codecs, default=codecs, help="default: all")
    add("--out", type=Path, default=ROOT / "results" / "gauge.csv", help="the CSV")
    return parser.parse_args(argv)


def runs(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """As `Row.run`, for every seed asked for."""
    return [(args.steps, args.rounds, seed) for seed in args.seeds]


def measured(args: argparse.Namespace) -> list[Row]:
    """All rows of the CSV, after the runs that were missing."""
    torch.set_num_threads(1)
    rows = load(args.out)
    held = {row.unit for row in rows}
    wanted = [
        (run, way, codec, asked)
        for run in runs(args)
        for codec, asked in CODECS
        for way in args.ways
        if codec in args.codecs
    ]
    for (steps, rounds, seed), name, codec, asked in (u for u in wanted if u not in held):
        task = kinds.open_task(WORK, args.data, not args.unverified)
        row = measure(task, name, codec, asked, seed=seed, rounds=rounds, steps=steps)
        rows.append(row)
        save(args.out, rows)
        print(f"seed {seed}:", *_cells(rows[-1:], rows), sep="  ", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
