"""What does a LoRA step cost on a device? Ours on the int4 weights that run, PEFT, bitsandbytes.

    python examples/bench_training.py                  # 135 M and slm-a; a table, about 5 minutes
    python examples/bench_training.py --quick --json   # slm-a only; the last line is one object

Knows the command line, rounds and the table. Does not know how a way trains
(`examples/training_lab.py`).

Each way runs in a process of its own, and all take a step in turn, so that a busy machine slows all
alike. Seconds are medians over rounds; `ratio` is the median over rounds of the way's CPU seconds
against those of our 16-bit step in the same round, `to_peft` against PEFT's. `peak_mb` is the
process's VmHWM less what it held before the model was built, `weights_mb` the bytes of weights
among it. The loss is taken over all tokens, by each way's own means: ours never holds the logits
(`edge_sdk.train.head`), the others ask the model for its loss. Adapters: rank 8, q and v.

A way whose package is not installed is named with how to get it. bitsandbytes, beside this venv:
`pip install bitsandbytes`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
REFERENCE, PLAIN = "ours, 16-bit", "peft, 16-bit"


class Worker:
    """One way's process."""

    def __init__(self, way: str, folder: Path, args: argparse.Namespace) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "examples.training_lab", way, str(folder)]
        numbers = [str(n) for n in (args.rows, args.tokens, args.threads)]
        self.way, self.wall, self.cpu = way, [], []  # type: ignore[var-annotated]
        self._process = subprocess.Popen(
            command + numbers,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
            cwd=ROOT.parent,
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        )
        self._answer()

    def step(self, *, counted: bool) -> None:
        """Take one step; the first are not counted, kernels are chosen in them."""
        answer = self._ask("step")
        if counted:
            self.wall.append(answer["wall"])
            self.cpu.append(answer["cpu"])

    def end(self) -> dict[str, float]:
        """Stop the process and return what it says of its memory."""
        facts = self._ask("end")
        self._process.wait(timeout=60)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return facts

    def _ask(self, word: str) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.way}: its process ended; see why with --verbose")
        answer: dict[str, float] = json.loads(line)
        return answer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", default="", help="of 135m, slm-a; default both")
    add("--ways", default="", help="parts of names, separated by |; default all")
    add("--rows", type=int, default=2, help="sequences per step (2)")
    add("--tokens", type=int, default=128, help="tokens per sequence (128)")
    add("--threads", type=int, default=1, help="as a device's train.threads (1)")
    add("--rounds", type=int, default=0, help="steps counted; default 10, with --quick 3")
    add("--quick", action="store_true", help="slm-a only, three rounds")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--verbose", action="store_true", help="show what the processes say")
    args = parser.parse_args(argv)
    args.models = args.models.split(",") if args.models else ["slm-a"] if args.quick else []
    args.models = args.models or ["135m", "slm-a"]
    args.rounds = args.rounds or (3 if args.quick else 10)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parse(argv)
    from examples.training_lab import INSTALL, NF4, OURS, PEFT, missing

    absent = missing()
    ways = [way for way in (*OURS, *PEFT, NF4) if way not in absent]
    chosen = args.ways.split("|")
    ways = [w for w in ways if w in (REFERENCE, PLAIN) or any(part in w for part in chosen)]
    print(_machine(args))
    for way, how in absent.items():
        print(f"missing: {way} ({how})")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            rows += measure(model, Path(folder) / model, ways, args)
    rows += [{"runtime": way, "model": None, "missing": INSTALL[way]} for way in absent]
    if args.json:
        print(json.dumps({"rows": rows}))
    return 0


def measure(
    model: str, folder: Path, ways: Sequence[str], args: argparse.Namespace
) -> list[dict[str, object]]:
    """The rows of one model; the table is printed."""
    from transformers import AutoConfig

    from examples.training_lab import smol_config, write_bundle

    config = smol_config()
    if model != "135m":
        config = AutoConfig.from_pretrained(ROOT / "models" / model)
    write_bundle(folder, config)
    workers = [Worker(way, folder, args) for way in ways]
    for number in range(args.rounds + 2):
        for worker in workers:
            worker.step(counted=number >= 2)
    by_way = {worker.way: worker for worker in workers}
    rows: list[dict[str, object]] = []
    print(f"\n{model}, {args.rows} x {args.tokens} tokens")
    names = f"{'step s':>8} {'cpu s':>8} {'ratio':>6} {'to peft':>8} {'weights':>8} {'peak MB':>8}"
    print(f"{'':26} {names} expected")
    for worker in workers:
        facts = worker.end()
        ratio, to_peft = (
            median(a / b for a, b in zip(worker.cpu, by_way[way].cpu, strict=True))
            for way in (REFERENCE, PLAIN)
        )
        row = {
            "runtime": worker.way,
            "model": model,
            "step_s": round(median(worker.wall), 4),
            "cpu_s": round(median(worker.cpu), 4),
            "cpu_min_s": round(min(worker.cpu), 4),
            "ratio": round(ratio, 3),
            "to_peft": round(to_peft, 3),
            **{key: round(value, 1) for key, value in facts.items()},
            "threads": args.threads,
        }
        rows.append(row)
        print(
            f"{worker.way:26} {row['step_s']:8.3f} {row['cpu_s']:8.3f} {ratio:6.2f} "
            f"{to_peft:8.2f} "
            f"{facts['weights_mb']:8.1f} {facts['peak_mb']:8.0f} {facts.get('predicted_mb', '')}"
        )
    return rows


def _machine(args: argparse.Namespace) -> str:
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{name}, {os.cpu_count()} cores, {args.threads} threads; {', '.join(found)}"


if __name__ == "__main__":
    sys.exit(main())
