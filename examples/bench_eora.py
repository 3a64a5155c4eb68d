"""What does a low-rank branch give back of what compression took? EoRA against its baselines.

    python examples/bench_eora.py             # both reference models; tables and two CSV files
    python examples/bench_eora.py --quick     # slm-a, three compressions, rank 8, no task: a minute

Knows the command line, the compressions to compare, and the tables. Does not know how one is
measured (`examples/eora_lab.py`) nor how a branch is computed (`compression/eora.py`).

Every linear layer of the blocks is compressed; embedding and head stay as they are. Calibration:
24 windows of 256 tokens, half WikiText-2 (train), half the demo's public requests. Measured on
WikiText-2 (validation) and on the requests that the demo's devices hold back, neither of which the
models were trained on. The task: the model is first trained on TREC, its adapter merged, and then
compressed; calibration is half WikiText-2, half TREC (train); measured on TREC's 500 test
questions. No setting was chosen on what is measured.

`bits_per_weight` counts the compressed layers' codes, 16-bit scales (and, for 2:4, 1 bit for which
values stay) and the branch at 16 bits. `recovered` is the share of the lost bits per byte that came
back, over both texts. Nothing packs int3 or 2:4 into that many bits for ONNX Runtime today: those
rows hold the exact values in float32.

`--models`, `--weights`, `--what` measure a part; the other rows of the CSV files stay.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as many processes as cores, one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edge_sdk.errors import FleetError
from examples.data.corpus import CorpusError
from examples.eora_lab import FIELDS, SCHEMES, TASK_FIELDS, Row, Settings, task_cell, text_cell
from examples.eora_speed import SPEED_FIELDS, speed
from examples.eora_texts import train_task
from examples.models import ModelError

ROOT = Path(__file__).resolve().parent
MODELS = ("slm-a", "llm")
WHAT = ("text", "task", "speed")
QUICK = ("int4 g32", "int3 g32", "2:4")
JOBS = min(2, os.cpu_count() or 1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent.parent / "shared" / "data", help="the corpora")
    add("--models", default="", help=f"of {', '.join(MODELS)}")
    add("--weights", default="", help=f"of {', '.join(SCHEMES)}")
    add("--ranks", default="", help="default: 8,32")
    add("--jobs", type=int, default=JOBS, help=f"processes, of one thread each; default: {JOBS}")
    add("--out", type=Path, help="the CSV; default: examples/results/eora.csv")
    add("--quick", action="store_true", help="slm-a, three compressions, rank 8, no task")
    add("--what", default="text,task,speed", help="default: text,task,speed; --quick: text,speed")
    args = parser.parse_args(argv)
    args.models = _names(parser, args.models, MODELS, ("slm-a",) if args.quick else MODELS)
    args.weights = _names(parser, args.weights, SCHEMES, QUICK if args.quick else SCHEMES)
    try:
        args.ranks = tuple(
            int(r) for r in (args.ranks or ("8" if args.quick else "8,32")).split(",")
        )
    except ValueError as exc:
        parser.error(f"--ranks: {exc}")
    name = "eora-quick.csv" if args.quick else "eora.csv"
    whats = ("text", "speed") if args.quick else WHAT
    args.what = _names(parser, args.what, WHAT, WHAT)
    args.what = [what for what in args.what if what in whats]
    args.out = args.out or ROOT / "results" / name
    return args


def _names(
    parser: argparse.ArgumentParser, given: str, known: Iterable[str], default: Iterable[str]
) -> list[str]:
    names = [name.strip() for name in given.split(",") if name] or list(default)
    for name in names:
        if name not in known:
            parser.error(f"unknown name {name!r}; known: {', '.join(known)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 done, 1 refused."""
    args = parse(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if {"text", "task"} & set(args.what):
            measure(args)
        if "speed" in args.what:
            rows = [row for model in args.models for row in speed(model, args.ranks)]
            write(args.out.with_name(args.out.stem + "-speed.csv"), SPEED_FIELDS, rows)
            print("\n" + table(rows, SPEED_FIELDS))
    except (CorpusError, ModelError, FleetError) as refusal:
        print(refusal, file=sys.stderr)
        return 1
    return 0


def measure(args: argparse.Namespace) -> None:
    """Measure all cells; each goes into its CSV file when it is done, and is printed."""
    settings = Settings(args.data, args.ranks)
    if "task" in args.what:
        for model in args.models:  # before the processes start, so that each is trained once
            train_task(model, args.data)
    begun, done = time.monotonic(), 0
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        work: dict[Any, tuple[Path, tuple[str, ...]]] = {}
        for weights in args.weights:
            for model in args.models:
                if "text" in args.what:
                    work[pool.submit(text_cell, model, weights, settings)] = (args.out, FIELDS)
                if "task" in args.what:
                    out = args.out.with_name(args.out.stem + "-trec.csv")
                    work[pool.submit(task_cell, model, weights, settings)] = (out, TASK_FIELDS)
        for future in as_completed(work):
            (path, fields), rows, done = work[future], future.result(), done + 1
            write(path, fields, rows)
            print(f"\n{done}/{len(work)}, {(time.monotonic() - begun) / 60:.1f} min")
            print(table(rows, fields), flush=True)


def write(path: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """Put the rows into the CSV; those of the same models and weights there are replaced."""

    def cell(row: Row) -> tuple[str, str]:
        return row["model"], row.get("weights", "")

    kept: list[Row] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if cell(row) not in set(map(cell, rows))]
    names = list(SCHEMES)
    ordered = sorted(
        [*kept, *rows],
        key=lambda r: (r["model"], names.index(r["weights"]) if "weights" in r else 0),
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)


def table(rows: Sequence[Row], fields: Sequence[str]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| {' | '.join(fields)} |", "|" + " --- |" * len(fields)]
    lines += ["| " + " | ".join(str(row.get(field, "")) for field in fields) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
