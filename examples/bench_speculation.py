"""What speculation gains on this machine: python -m examples.bench_speculation [--threads 1]

Knows the reference pair (slm-a drafts for llm) and the demo's held-out requests. Does not know how
guesses are judged (edge_sdk/speculation.py).

Each prompt is answered by every way in turn, so that a busy moment hits them alike; speed is after
the first token. `--cpu` counts processor seconds instead of seconds, for a machine that others use
too (threads 1 only). Ways: plain; the text itself as the guesser (lookup), once and asked again;
slm-a as the guesser; both; onnxruntime-genai's own draft and n-gram modes.
"""

import argparse
import json
import lzma
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_sdk.measure import peak_mb
from edge_sdk.runtime import SlmSession
from edge_sdk.speculation import Speculator
from examples.models import cache_folder, materialize

MAX_TOKENS = 128
REQUESTS = Path(__file__).with_name("data") / "dolly_test.jsonl.xz"
Row = dict[str, Any]


@dataclass(slots=True)
class Tally:
    """Tokens after the first, their seconds, and what was written."""

    tokens: int = 0
    seconds: float = 0.0
    first_s: float = 0.0
    written: list[list[int]] = field(default_factory=list)

    def take(self, answer: Any, clock: Callable[[], float]) -> None:
        """Read `answer` to its end and count it."""
        begun, first, known = clock(), 0.0, 0
        for _ in answer:
            if not first:
                first, known = clock(), len(answer.tokens)
        self.first_s += first - begun
        self.tokens += len(answer.tokens) - known
        self.seconds += clock() - first
        self.written.append(list(answer.tokens))


def measure(
    target: Path,
    draft: Path | None,
    prompts: Sequence[str],
    *,
    threads: int = 1,
    max_tokens: int = MAX_TOKENS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Return one row per way for two bundles; `draft` None leaves the draft model out.

    Each row has runtime, model, tokens_per_s, first_token_ms, peak_mb, disk_mb, and besides: factor
    (over plain, in the same run), predicted (the formula with v(g)) and measured (both of passes
    only, text and prompt left out), alpha, tokens_per_pass, same (share of answers with plain's
    tokens) and off.
    """
    plain = SlmSession(target, threads=threads, max_tokens=max_tokens)
    small = None if draft is None else SlmSession(draft, threads=1)
    ways = {"lookup": Speculator(plain, threads=threads, clock=clock)}
    if small is not None:
        ways["draft"] = Speculator(plain, small, threads=threads, lookup=False, clock=clock)
        ways["lookup and draft"] = Speculator(plain, small, threads=threads, clock=clock)
    again = Speculator(plain, threads=threads, clock=clock)
    for way in (*ways.values(), again):
        way.calibrate()
    tallies = {name: Tally() for name in ("plain", *ways, "lookup, asked again")}
    for prompt in prompts:
        tallies["plain"].take(plain.stream(prompt), clock)
        for name, way in ways.items():
            tallies[name].take(way.stream(prompt), clock)
        Tally().take(again.stream(prompt), clock)
        tallies["lookup, asked again"].take(again.stream(prompt), clock)
    rows = [
        _row(name, tally, tallies["plain"], target, ways.get(name))
        for name, tally in tallies.items()
    ]
    for session in (plain, small):
        if session is not None:
            session.close()
    return rows


def _row(name: str, tally: Tally, plain: Tally, model: Path, way: Speculator | None) -> Row:
    rate, base = tally.tokens / tally.seconds, plain.tokens / plain.seconds
    pairs = list(zip(tally.written, plain.written, strict=True))
    row: Row = {
        "runtime": "ours" if name == "plain" else f"ours, speculative: {name}",
        "model": model.name,
        "tokens_per_s": round(rate, 1),
        "first_token_ms": round(1000 * tally.first_s / len(tally.written), 2),
        "peak_mb": round(peak_mb(), 1),
        "disk_mb": round(sum(f.stat().st_size for f in model.iterdir() if f.is_file()) / 1e6, 1),
        "factor": round(rate / base, 3),
        "same": sum(a == b for a, b in pairs) / len(pairs),
    }
    if way is not None and way.costs is not None:
        report = way.report()
        row |= {
            "predicted": round(report.predicted, 3),
            "measured": round(report.measured, 3),
            "alpha": round(report.alpha, 3),
            "tokens_per_pass": round(report.tokens / max(1, report.passes), 3),
            "v": [round(v, 2) for v in way.costs.verify],
            "c": round(way.costs.draft, 3),
            "off": report.off,
        }
    return row


def requests(count: int) -> list[str]:
    """Return `count` of the demo's held-out requests as prompts."""
    with lzma.open(REQUESTS, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [f"Request: {text}\nAnswer:" for text in texts[:count]]


def pair() -> tuple[Path, Path]:
    """Return the reference pair's bundles, the target's made speculative; made on first use."""
    from exporters.draft import add_draft

    target, draft = bundle("llm"), bundle("slm-a")
    out = target.with_name(f"{target.name}-speculative")
    if not out.exists():
        add_draft(target, draft, out)
    return out, draft


def bundle(name: str) -> Path:
    """Return the bundle of an example model, exported on first use."""
    from exporters.slm import export_slm

    folder = materialize(name)
    out = cache_folder() / f"{folder.name}-bundle"
    if not out.exists():
        export_slm(folder, out, family=name, release="bench")
    return out


def show(rows: Iterable[Row]) -> None:
    """Print the rows as a table."""
    for row in rows:
        keys = ("predicted", "measured", "alpha", "tokens_per_pass", "v", "c")
        more = ", ".join(f"{key} {row[key]}" for key in keys if key in row)
        off = f"; off: {row['off']}" if row.get("off") else ""
        print(
            f"{row['runtime']:40} {row['tokens_per_s']:8.1f} tok/s  x{row['factor']:.2f}  "
            f"same {row['same']:.0%}  {more}{off}"
        )


def main() -> None:
    """Print the table; with --json the rows as one object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
    target, draft = pair()
    rows = measure(target, draft, requests(args.prompts), threads=args.threads, clock=clock)
    show(rows)
    if args.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
