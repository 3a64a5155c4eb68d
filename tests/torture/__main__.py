"""`python -m tests.torture`: runs figures, one process each, and writes torture.json and .md.

Knows the table of figures and the result files. Does not know what a figure does.

    python -m tests.torture [--only L1,F2] [--full|--short] [--seed 7] [--out FOLDER] [--list]

Figures may be run one by one: a run replaces its own lines in the result files and keeps the
others. A full run writes to tests/results, a short one to tests/results/short. Exit status: 0 all
passed, 1 one failed or its module is not there, 2 misuse.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.torture.machine import machine, versions
from tests.torture.report import markdown
from tests.torture.result import Result, Run, Scale, ask_minutes, say

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = Path("tests/results")
LIMIT_S = 1500.0
"""A figure that takes longer than this is stopped and has failed; B3 may be asked for more."""

_CHILD_FAILED = 3  # the child wrote a line that says "failed"; 1 would be a crash of Python's

Table = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the goals: its code, what it is about and what must be reached."""

    code: str
    title: str
    goal: str

    @property
    def module(self) -> str:
        """The module's dotted name, "" while nobody has written it."""
        found = sorted(HERE.glob(f"{self.code.lower()}_*.py"))
        return f"tests.torture.{found[0].stem}" if found else ""


FIGURES = {
    figure.code: figure
    for figure in (
        Figure("L1", "sustained upload through mosquitto", ">= 40 MB/s for 60 s, 0 lost"),
        Figure("L2", "sustained upload through amqtt", ">= 20 MB/s, 0 lost"),
        Figure("L3", "1,000 devices in one round", "all within 120 s, p99 chunk ack < 1 s"),
        Figure("L4", "memory ceilings", "coordinator < 500 MB, broker < 300, device < 64"),
        Figure("L7", "cost of seal and open", "16 MiB < 60 ms each, overhead < 0.2 %"),
        Figure("F1", "kill -9 of the coordinator", "200 kills, 0 lost, recovery < 5 s"),
        Figure("F2", "kill -9 of the broker", "100 kills, 0 lost"),
        Figure("F3", "kill -9 of a device", "200 kills, re-sends < 2 windows, 0 lost"),
        Figure("F4", "network faults", "500 schedules, 0 lost, all finish"),
        Figure("F5", "a broker that drops", "0 lost at the rate of L1"),
        Figure("F6", "disk full", "50 runs each: typed error, opens, resumes, 0 lost"),
        Figure("F7", "power cut", ">= 1,000 fsync prefixes open and pass the checker"),
        Figure("F8", "wrong clocks", "enrol, round and update correct, 0 expired accepted"),
        Figure("F10", "key rotation under load", "20 rotations, 0 lost"),
        Figure("F11", "oversized or refused message", "0 reconnect loops, item parked"),
        Figure("B1", "envelope mutations", ">= 100,000, 0 accepted, < 5 ms each"),
        Figure("B2", "replays across restarts", "10,000, 0 accepted"),
        Figure("B3", "fuzzing each parser", "0 crashes, RSS < 512 MB"),
        Figure("B4", "bombs", "20 files refused < 1 s, RSS growth < 64 MB"),
        Figure("B5", "hostile ONNX", "0 reads outside, 0 unsigned loads"),
        Figure("B6", "attacks on model updates", ">= 15 attacks, 0 accepted"),
        Figure("B7", "token race", "1 of 100 wins; expired or wrong: 0"),
        Figure("B8", "tenant isolation", "0 allowed"),
        Figure("B9", "revocation", "0 accepted after 1 s, session closed < 10 s"),
        Figure("B11", "poisoning by 20 % of the devices", "within 3 points of the clean run"),
        Figure("B12", "no pickle", "0"),
        Figure("P1", "published vectors", "0 mismatches"),
        Figure("P2", "what the broker sees", "0 of 1,000 planted secrets"),
        Figure("P7", "keys at rest and in logs", "0600, 0 hits"),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and return the exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=args.log)  # faults make warnings by the thousand
    if args.list:
        _list()
        return 0
    scale = Scale(args.scale)
    out: Path = args.out or (RESULTS if scale is Scale.FULL else RESULTS / "short")
    if args.minutes is not None:
        ask_minutes(args.minutes)
    codes = _codes(args.only)
    table: Table = {}
    for code in codes:
        if len(codes) == 1:  # in this process, to be debugged; Ctrl-C stops it
            entry = measure(FIGURES[code], scale, args.seed)
            keep(out, {code: entry})
        else:
            _in_a_process(FIGURES[code], scale, args.seed, out, args.limit)
            entry = load(out)[code]
        table[code] = entry
    failed = [code for code in codes if not table[code]["passed"]]
    if args.child:
        return _CHILD_FAILED if failed else 0
    say("torture", f"{len(codes) - len(failed)} of {len(codes)} passed; results in {out}")
    if failed:
        say("torture", f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def measure(figure: Figure, scale: Scale, seed: int) -> dict[str, Any]:
    """Run one figure here and return its line of torture.json; a crash is a failed figure."""
    began = time.monotonic()
    if not figure.module:
        return entry_of(_failure(figure, "its module is missing"), scale, seed, 0.0)
    with tempfile.TemporaryDirectory(prefix=f"torture-{figure.code}-") as folder:
        try:
            run: Run = importlib.import_module(figure.module).run
            result = run(scale, seed, Path(folder))
        except Exception as exc:
            traceback.print_exc()
            text = f"{type(exc).__name__}: {exc}".replace(folder, "FOLDER")
            result = _failure(figure, text)
    seconds = time.monotonic() - began
    verdict = "passed" if result.passed else "FAILED"
    say(figure.code, f"{verdict} after {seconds:.1f} s: {result.value} {result.unit}")
    return entry_of(result, scale, seed, seconds)


def entry_of(result: Result, scale: Scale, seed: int, seconds: float) -> dict[str, Any]:
    """Return a result as a line of torture.json."""
    command = f"python -m tests.torture --only {result.code} --{scale} --seed {seed}"
    return {
        "title": result.title,
        "value": result.value,
        "unit": result.unit,
        "goal": result.goal,
        "passed": result.passed,
        "lost": result.lost,
        "doubled": result.doubled,
        "command": result.command or command,
        "notes": result.notes,
        "scale": str(scale),
        "seed": seed,
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions(),
    }


def load(out: Path) -> Table:
    """Return the lines that `out`/torture.json holds; none when there is no such file."""
    try:
        table: Table = json.loads((out / "torture.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return table


def keep(out: Path, news: Table) -> None:
    """Replace the lines of `news` in both result files; a reader sees all of it or nothing."""
    out.mkdir(parents=True, exist_ok=True)
    known = {**load(out), **news}
    order = [*FIGURES, *sorted(set(known) - set(FIGURES))]
    table = {code: known[code] for code in order if code in known}
    _write(out / "torture.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    _write(out / "torture.md", markdown(table))


def _write(path: Path, text: str) -> None:
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _in_a_process(figure: Figure, scale: Scale, seed: int, out: Path, limit_s: float) -> None:
    """Run a figure in a process of its own, so that nothing it does can harm the next one."""
    command = [sys.executable, "-m", "tests.torture", "--child", "--only", figure.code]
    command += [f"--{scale}", "--seed", str(seed), "--out", str(out.resolve())]
    say(figure.code, f"{figure.title}: {figure.goal}")
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = child.wait(limit_s or None)
        problem = "" if status in (0, _CHILD_FAILED) else f"its process ended with {status}"
    except subprocess.TimeoutExpired:
        problem = f"not finished within {limit_s:.0f} s"
    finally:
        _end(child)
    if problem:
        keep(out, {figure.code: entry_of(_failure(figure, problem), scale, seed, 0.0)})


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End the child and all it started; they share its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, 9)
    child.wait()


def _failure(figure: Figure, why: str) -> Result:
    say(figure.code, f"failed: {why}")
    return Result(figure.code, figure.title, False, "", figure.goal, False, notes={"failure": why})


def _codes(only: str) -> list[str]:
    wished = [code.strip().upper() for code in only.split(",") if code.strip()] or list(FIGURES)
    unknown = [code for code in wished if code not in FIGURES]
    if unknown:
        raise SystemExit(f"no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    return list(dict.fromkeys(wished))


def _list() -> None:
    for figure in FIGURES.values():
        print(f"{figure.code:4} {figure.title}: {figure.goal}  [{figure.module or 'missing'}]")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", metavar="L1,F2", help="these figures; else all")
    for scale in Scale:
        parser.add_argument(f"--{scale}", dest="scale", action="store_const", const=str(scale))
    parser.set_defaults(scale=str(Scale.SHORT))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help=f"folder of the result files ({RESULTS})")
    parser.add_argument("--list", action="store_true", help="print the figures and stop")
    parser.add_argument("--minutes", type=float, help="for figures that fuzz as long as one likes")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds per figure, 0: none")
    parser.add_argument("--log", default="CRITICAL", help="level of the product's own log lines")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
