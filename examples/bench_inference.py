"""Is ours the fastest? One model, the same weights, the runtimes a user might pick instead.

    python examples/bench_inference.py                          # about ten minutes on two cores
    python examples/bench_inference.py --peer-python peers/bin/python \\
        --optimum-python optimum/bin/python --json

Compared: our runtime (`edge_sdk.SlmSession`), transformers in PyTorch, the graph of optimum-onnx,
llama.cpp with Q4_0, onnxruntime-genai as it comes, and our own speculative decoding. Two models:
the example LLM (12.5 M parameters) and one of SmolLM2-135M's shape with random weights.

Each runtime runs in a process of its own, one request at a time; a round asks every runtime once,
so that what else the machine does falls on all alike, and medians over the rounds are printed. A
request is a prompt of 256 tokens for the first token, and one of 64 followed by `--tokens` more,
greedily, for the speed. `of bound` is the speed over what the memory's bandwidth would allow if a
token did nothing but read the int4 weights once; models that fit a cache may come near it or pass.

What is not installed is named as missing. llama.cpp and optimum-onnx want environments of their
own (optimum-onnx 0.1 needs transformers below 4.58):

    python -m venv peers && peers/bin/pip install llama-cpp-python gguf numpy
    python -m venv optimum
    optimum/bin/pip install torch "optimum-onnx[onnxruntime]" "transformers<4.58"

Knows the command line and the table. Does not know runtimes (inference/worker.py) or converters
(inference/subjects.py).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.inference.subjects import (
    MODELS,
    SubjectError,
    bytes_per_token,
    files,
    size_mb,
    weights,
)
from examples.models import cache_folder

OURS = "symbiont"
RUNTIMES = (OURS, "speculative", "genai", "llama.cpp", "optimum-onnx", "transformers")
NEEDS = {
    OURS: ("onnxruntime_genai", "pip install 'symbiont[infer]'"),
    "speculative": ("onnxruntime_genai", "pip install 'symbiont[infer]'"),
    "genai": ("onnxruntime_genai", "pip install onnxruntime-genai"),
    "llama.cpp": ("llama_cpp,gguf", "pip install llama-cpp-python gguf numpy; --peer-python"),
    "optimum-onnx": (
        "optimum.onnxruntime",
        "pip install torch 'optimum-onnx[onnxruntime]' 'transformers<4.58' in an environment of "
        "its own; --optimum-python",
    ),
    "transformers": ("torch,transformers", "pip install torch transformers"),
}
"""What each runtime imports, and how to get it."""

PROMPT, WARM = 256, 64
PAUSE_S = 0.1
"""Between two processes: threads of the one before may still spin, waiting for more work."""
TEXT = (
    "The harbour was quiet when the first boat came in. A woman on the quay counted the crates, "
    "wrote the number on a slate and asked what the weather had been like beyond the lighthouse. "
    "Nobody answered at first. Then the oldest of the crew said that the wind had turned twice in "
    "the night, and that they had seen lights to the north where no village stands. "
)
"""Written for this file; repeated until it is long enough."""


@dataclass
class Row:
    """What was measured of one runtime with one model; lists have one figure a round."""

    runtime: str
    model: str
    disk_mb: float
    versions: dict[str, str] = field(default_factory=dict)
    tokens_per_s: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    def figures(self) -> dict[str, Any]:
        """The row as the last line has it: medians."""
        return {
            "runtime": self.runtime,
            "model": self.model,
            "tokens_per_s": round(statistics.median(self.tokens_per_s), 1),
            "first_token_ms": round(statistics.median(self.first_token_ms), 2),
            "peak_mb": round(self.peak_mb, 1),
            "disk_mb": round(self.disk_mb, 1),
        }


class Worker:
    """A runtime's process; see inference/worker.py."""

    def __init__(self, python: Path, runtime: str, path: str, threads: int) -> None:
        script = Path(__file__).resolve().parent / "inference" / "worker.py"
        self._process = subprocess.Popen(
            [str(python), str(script), runtime, path, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.versions: dict[str, str] = self._read()["versions"]

    def ask(self, request: dict[str, Any]) -> dict[str, float]:
        """Time one request.  Raises: SubjectError when the process failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone; reading says why
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        self._said.extend(self._process.stderr)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise SubjectError("".join(self._said).strip()[-600:] or "it ended without a word")
        return json.loads(line)


def request_for(model: str, cache: Path, new: int) -> dict[str, Any]:
    """Two prompts of PROMPT and WARM tokens, as ids and as the text that has just these."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights(model, cache) / "tokenizer.json"))
    ids = tokenizer.encode(TEXT * 8).ids

    def prompt(count: int) -> tuple[list[int], str]:
        for start in range(len(ids) - count):
            text = tokenizer.decode(ids[start : start + count])
            if tokenizer.encode(text).ids == ids[start : start + count]:
                return ids[start : start + count], text
        raise SubjectError(f"{model}: no text of exactly {count} tokens")

    (long, text), (short, warm_text) = prompt(PROMPT), prompt(WARM)
    return {"ids": long, "text": text, "warm": short, "warm_text": warm_text, "new": new}


def missing(python: Path, modules: str) -> str:
    """Why `python`'s environment cannot import `modules`, "" if it can."""
    code = f"import {modules}"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stderr.strip().rsplit("\n", 1)[-1] if done.returncode else ""


def bandwidth(threads: int, *, size: int = 256 * 2**20, times: int = 7) -> float:
    """Bytes per second that `threads` threads read from memory, the best of some tries."""
    parts = np.array_split(np.ones(size // 8), threads)
    best = float("inf")
    for _ in range(times):
        workers = [threading.Thread(target=part.sum) for part in parts]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - started)
    return size / best


def measure(model: str, pythons: dict[str, Path], options: argparse.Namespace) -> list[Row]:
    """All runtimes of `pythons` on one model, in turns."""
    request = request_for(model, options.cache, options.tokens)
    running: list[tuple[Row, Worker]] = []
    try:
        for runtime, python in pythons.items():
            if runtime == "speculative" and model != "llm":
                continue  # no smaller model shares the made-up tokenizer
            try:
                path = str(files(runtime, model, options.cache, python, block=options.block))
                worker = Worker(python, runtime, path, options.threads)
                running.append((Row(runtime, model, size_mb(path), worker.versions), worker))
                worker.ask(request)  # not counted
            except SubjectError as exc:
                print(f"{runtime} on {model} failed: {exc}")
                running = [pair for pair in running if pair[0].runtime != runtime]
        for turn in range(options.rounds):
            first = turn % max(1, len(running))  # nobody always comes after the same one
            for row, worker in (*running[first:], *running[:first]):
                time.sleep(PAUSE_S)
                found = worker.ask(request)
                row.tokens_per_s.append(found["tokens_per_s"])
                row.first_token_ms.append(found["first_token_ms"])
                row.peak_mb = found["peak_mb"]
    finally:
        for _, worker in running:
            worker.close()
    return [row for row, _ in running]


def table(rows: Sequence[Row], bound: float) -> str:
    """The rows as text; `bound` is tokens per second that the memory would allow."""
    ours = next((row.figures() for row in rows if row.runtime == OURS), None)
    lines = [
        f"{'runtime':<14}{'tokens/s':>10}{'ours is':>9}{'first ms':>10}{'ours is':>9}"
        f"{'peak MB':>9}{'disk MB':>9}{'of bound':>10}"
    ]
    for row in rows:
        it = row.figures()
        speed = f"{ours['tokens_per_s'] / it['tokens_per_s']:.2f}x" if ours else ""
        first = f"{it['first_token_ms'] / ours['first_token_ms']:.2f}x" if ours else ""
        lines.append(
            f"{it['runtime']:<14}{it['tokens_per_s']:>10.1f}{speed:>9}{it['first_token_ms']:>10.1f}"
            f"{first:>9}{it['peak_mb']:>9.0f}{it['disk_mb']:>9.0f}"
            f"{it['tokens_per_s'] / bound:>10.0%}"
        )
    return "\n".join(lines)


def processor() -> str:
    """The processor's name as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    here = Path(sys.executable)
    add("--peer-python", type=Path, default=here, help="the Python that has llama-cpp-python, gguf")
    add("--optimum-python", type=Path, default=here, help="the Python that has optimum-onnx")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    add("--rounds", type=int, default=7, help="medians are over this many")
    add("--tokens", type=int, default=64, help="tokens written per request")
    add("--threads", type=int, default=2)
    add("--block", type=int, choices=(16, 32, 64, 128), help="ours: weights per scale")
    add("--cache", type=Path, default=cache_folder().parent / "inference")
    add("--json", action="store_true", help="the last line is one JSON object")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse(argv)
    elsewhere = {"llama.cpp": options.peer_python, "optimum-onnx": options.optimum_python}
    pythons = {name: elsewhere.get(name, Path(sys.executable)) for name in options.runtimes}
    absent = {name: why for name in pythons if (why := missing(pythons[name], NEEDS[name][0]))}
    for name, why in absent.items():
        print(f"missing: {name} ({why}); to install it: {NEEDS[name][1]}")
        del pythons[name]
    speed = bandwidth(options.threads)
    print(
        f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}; {options.threads} threads, median of {options.rounds} "
        f"rounds; memory read at {speed / 1e9:.1f} GB/s; {time.strftime('%Y-%m-%d')}"
    )
    rows: list[Row] = []
    for model in options.models:
        found = measure(model, pythons, options)
        rows += found
        try:
            ours = files(OURS, model, options.cache, Path(sys.executable), block=options.block)
        except SubjectError as exc:
            print(f"{model} has no int4 bundle: {exc}")
            return 1
        each = bytes_per_token(ours)
        bound = speed / each
        print(f"\n{model}: a token reads {each / 1e6:.1f} MB, bound {bound:.0f} tokens/s")
        print(table(found, bound))
    print()
    for runtime, versions in {row.runtime: row.versions for row in rows}.items():
        print(f"{runtime}: {', '.join(f'{k} {v}' for k, v in versions.items())}")
    if options.json:
        print(json.dumps({"rows": [row.figures() for row in rows], "missing": sorted(absent)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
