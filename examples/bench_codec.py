"""Rate against distortion and against final loss: every codec at equal bytes in the same run.

    python examples/bench_codec.py            # three kinds of work, three seeds, all methods
    python examples/bench_codec.py --quick    # one seed, fewer rounds: under ten minutes, two cores

Knows the command line. Does not know works, methods or runs: see `examples/codec_bench/`
(`kinds`, `fleet`, `methods`, `sessions`, `runs`, `results`, `tables`).

Eight clients start every round from the same adapter, take ten local AdamW steps, and the mean of
what is decoded of their updates is added to it; 40 rounds, counted from the first. `progress_kept`
is the drop of the held-out loss over the uncompressed run's. `bytes` are of one update, uplink,
with headers, the seal's tag, and a device's codec files spread over its updates. Stop it whenever
you like: finished runs are in the result files and are not computed again.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as many processes as cores, one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from edge_sdk.errors import FleetError
from examples.codec_bench import kinds, runs, tables
from examples.codec_bench.methods import METHODS, RATIOS, UNCOMPRESSED
from examples.codec_bench.plot import lines_plot
from examples.codec_bench.results import Results, ResultsError, Unit, fingerprint_of
from examples.data.corpus import CorpusError
from examples.models import ModelError

ROOT = Path(__file__).resolve().parent
FORMAT = 2
"""Raised when a change of this benchmark makes earlier rows incomparable."""

ROUNDS, QUICK_ROUNDS = 40, 8
SEEDS = (1, 2, 3)
JOBS = min(2, os.cpu_count() or 1)
VERSIONS = ("torch", "transformers", "numpy", "constriction", "tokenizers")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent.parent / "shared" / "data", help="the corpora")
    add("--unverified", action="store_true", help="take files whatever their checksums")
    add("--works", default="", help=f"of {', '.join(kinds.KINDS)}")
    add("--methods", default="", help=f"of {', '.join(METHODS)}")
    add("--ratios", default="", help="of methods with a knob; default: " + _joined(RATIOS))
    add("--seeds", default="", help="default: " + _joined(SEEDS))
    add("--rounds", type=int, default=0, help=f"default: {ROUNDS}")
    add("--jobs", type=int, default=JOBS, help=f"processes, of one thread each; default: {JOBS}")
    add("--out", type=Path, help="the CSV; default: examples/results/codec.csv")
    add("--quick", action="store_true", help=f"one seed, {QUICK_ROUNDS} rounds, no large adapter")
    add("--redo", action="store_true", help="measure the named methods again")
    add("--report", action="store_true", help="only print and draw what is there")
    args = parser.parse_args(argv)
    works = [name for name in kinds.KINDS if name != "large"] if args.quick else list(kinds.KINDS)
    args.works = _names(parser, args.works, kinds.KINDS, works)
    args.methods = _names(parser, args.methods, METHODS, METHODS)
    try:
        args.ratios = [int(r) for r in args.ratios.split(",") if r]
        args.seeds = [int(s) for s in args.seeds.split(",") if s]
    except ValueError as exc:
        parser.error(f"ratios and seeds are whole numbers: {exc}")
    args.seeds = args.seeds or list(SEEDS[:1] if args.quick else SEEDS)
    args.ratios = args.ratios or list((30, 300) if args.quick else RATIOS)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    name = "codec" if args.rounds == ROUNDS else f"codec-{args.rounds}-rounds"
    args.out = args.out or ROOT / "results" / (f"{name}-quick.csv" if args.quick else f"{name}.csv")
    return args


def _joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _names(parser: Any, given: str, known: Any, default: Any) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()] or list(default)
    for name in names:
        if name not in known:
            parser.error(f"unknown name {name!r}; known: {', '.join(known)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 done, 1 refused."""
    args = parse(argv)
    try:
        return benchmark(args)
    except (CorpusError, ModelError, ResultsError, FleetError, runs.MethodError) as refusal:
        print(refusal, file=sys.stderr)
        return 1


def benchmark(args: argparse.Namespace) -> int:
    """Measure what is not there yet, then print and draw."""
    results = Results(args.out, _fingerprint(args), _facts(args))
    results.load()
    if results.thrown:
        print(f"{results.thrown} rows were made with other settings and are thrown away")
    if not args.report:
        measure(results, args)
    report(results, args)
    return 0


def units(args: argparse.Namespace) -> Iterator[Unit]:
    """All runs asked for, in order; the uncompressed one is always among them."""
    for seed in args.seeds:
        for work in args.works:
            for method in [UNCOMPRESSED, *(m for m in args.methods if m != UNCOMPRESSED)]:
                own = METHODS[method].ratios
                for ratio in own if own == (0,) else args.ratios:
                    yield work, seed, method, ratio


def measure(results: Results, args: argparse.Namespace) -> None:
    """Run what is missing: the uncompressed runs first, for all others are shares of them."""
    wanted = list(units(args))
    again = args.methods if args.redo else ()
    todo = [unit for unit in wanted if unit[2] in again or unit not in results.rows]
    kinds.check_files(sorted({unit[0] for unit in todo}), args.data, not args.unverified)
    began, done = time.monotonic(), 0
    for first in (True, False):
        part = [unit for unit in todo if (unit[2] == UNCOMPRESSED) is first]
        for unit, found in _all(part, args):
            done += 1
            _store(results, unit, found)
            row = results.rows[unit]
            print(
                f"{done}/{len(todo)} {(time.monotonic() - began) / 60:5.1f} min  {unit[0]} seed "
                f"{unit[1]}: {unit[2]}, {row.value('ratio'):.0f} times fewer bytes, "
                f"kept {row.value('progress_kept'):.3f} ({found.seconds:.0f} core-s)",
                flush=True,
            )


def _all(part: list[Unit], args: argparse.Namespace) -> Iterator[tuple[Unit, runs.Measured]]:
    if args.jobs <= 1:
        for unit in part:
            yield unit, run(unit, args.data, args.rounds, not args.unverified)
        return
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        rest = (args.data, args.rounds, not args.unverified)
        work = {pool.submit(run, unit, *rest): unit for unit in part}
        try:
            for future in as_completed(work):
                yield work[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run(unit: Unit, data: Path, rounds: int, verified: bool) -> runs.Measured:
    """One run, in this process."""
    torch.set_num_threads(1)
    work, seed, method, ratio = unit
    task = kinds.open_task(work, data, verified)
    return runs.measure(task, method, ratio, seed=seed, rounds=rounds)


def _store(results: Results, unit: Unit, found: runs.Measured) -> None:
    work, seed, method, _ = unit
    losses = found.losses
    if method != UNCOMPRESSED:
        losses = tuple(results.rows[work, seed, UNCOMPRESSED, 0].losses)
    results.add(
        unit,
        (
            found.ratio, found.bytes, runs.kept(found, losses), found.cosine, found.nmse,
            found.encode_ms, found.decode_ms,
        ),
        {
            "losses": found.losses,
            "code_bytes": found.code_bytes,
            "codec_bytes": found.codec_bytes,
            "size": found.size,
            "core_s": round(found.seconds, 1),
        },
    )  # fmt: skip


def _fingerprint(args: argparse.Namespace) -> Any:
    @cache
    def files(work: str) -> dict[str, str]:
        return kinds.files_read(work, args.data, not args.unverified)

    def fingerprint(unit: Unit) -> str:
        work, _seed, method, _ratio = unit
        known = METHODS[method].version if method in METHODS else 0
        settings = dataclasses.asdict(kinds.KINDS[work][1]) if work in kinds.KINDS else {}
        return fingerprint_of(
            {
                "format": FORMAT,
                "settings": settings,
                "rounds": args.rounds,
                "method": known,
                "files": files(work) if work in kinds.KINDS else {},
                "dtype": str(kinds.quickest_dtype()),
            }
        )

    return fingerprint


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version(), **{n: version(n) for n in VERSIONS}},
        "processor": processor(),
        "rounds": args.rounds,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def report(results: Results, args: argparse.Namespace) -> None:
    """Print the tables, draw the plot."""
    rows = {
        unit: row
        for unit, row in results.rows.items()
        if unit[0] in args.works and unit[1] in args.seeds
    }
    names = list(METHODS)
    print("\n" + tables.table(rows, args.works, names))
    for line in [*tables.goals(rows, args.works), *tables.codec_files(rows)]:
        print(line)
    facts = results.facts
    held = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    print(f"{facts['processor']}, one thread a run; {held}; {facts['date']}")
    spent = sum(float(row.facts["core_s"]) for row in rows.values())
    print(f"{len(rows)} runs, {spent / 60:.1f} core-minutes; rows in {args.out}")
    panels = {
        f"{work}: share of the uncompressed run's progress kept": found
        for work in args.works
        if (found := tables.curves(rows, work))
    }
    shown = [name for name in names if any(name in found for found in panels.values())]
    drawn = lines_plot(panels, shown, "Bytes and learning: every codec, mean over seeds")
    args.out.with_suffix(".svg").write_text(drawn, encoding="utf-8")


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
