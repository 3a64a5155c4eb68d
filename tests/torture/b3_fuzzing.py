"""B3: each parser, fed with damaged and invented bytes, raises its own error or none.

Knows two engines. The short form is a seeded mutator: it runs everywhere, in the same way. The full
form is atheris (coverage-guided, a process per parser, RSS limited to 512 MB), one minute per
parser unless `--minutes` says otherwise; where atheris has no wheel the mutator takes its place and
the notes say so. Does not know the parsers: `parsers.py` lists them.
"""

import importlib.util
import random
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.torture.parsers import Parser, outcome, parsers
from tests.torture.result import Result, Scale, minutes, say
from tests.torture.watched import ROOT

SHORT_CASES = 1_500
MAX_RSS_MB = 512
MAX_INPUT_BYTES = 4096
WORKERS = 2
_NASTY = (b"\0", b"\xff", b"\x7f", b"\x80", b"[", b"{", b"..", b"\r\n", b"\xdd\xff\xff\xff\xff")


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Fuzz every parser and count inputs that ended in any other way than a value or its error."""
    guided = scale is Scale.FULL and importlib.util.find_spec("atheris") is not None
    names = list(parsers())
    if guided:
        with ThreadPoolExecutor(WORKERS) as pool:
            reports = list(pool.map(lambda name: guided_fuzz(name, seed, folder), names))
    else:
        seconds = 60 * minutes(1.0) if scale is Scale.FULL else 0.0
        reports = [mutate(parsers()[name], seed, seconds=seconds) for name in names]
    crashes = {name: r.crashes for name, r in zip(names, reports, strict=True) if r.crashes}
    most = max(report.rss_mb for report in reports)
    return Result(
        "B3",
        "fuzzing each parser",
        sum(map(len, crashes.values())),
        f"crashes in {sum(r.cases for r in reports):,} inputs to {len(names)} parsers",
        f"0 crashes but typed errors, RSS < {MAX_RSS_MB} MB",
        not crashes and most < MAX_RSS_MB and all(r.cases > 0 for r in reports),
        notes={
            "engine": "atheris" if guided else "seeded mutator",
            "inputs": {name: r.cases for name, r in zip(names, reports, strict=True)},
            "peak RSS MB": round(most, 1),
            "crashes": crashes,
        },
    )


class Report:
    """What fuzzing one parser came to."""

    def __init__(self, cases: int, crashes: list[str], rss_mb: float) -> None:
        self.cases, self.crashes, self.rss_mb = cases, crashes, rss_mb


# --- the seeded mutator -----------------------------------------------------------------------


def mutate(parser: Parser, seed: int, *, seconds: float = 0.0, cases: int = SHORT_CASES) -> Report:
    """Feed a parser for so many seconds, or with so many inputs when `seconds` is 0."""
    rng = random.Random(f"{seed} {parser.name}")
    seen: Counter[str] = Counter()
    until = time.monotonic() + seconds
    count = 0
    while count < cases or time.monotonic() < until:
        seen[outcome(parser, mutated(rng, parser.seeds))] += 1
        count += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    crashes = sorted(text for text in seen if text.startswith("crash"))
    # In a session of pytest the peak is that of all tests so far; only a process of ours is judged.
    return Report(count, crashes, peak if "pytest" not in sys.modules else 0.0)


def mutated(rng: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    """Return a seed after one to eight changes, or now and then noise."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(200))
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(1, 9)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                data[at:at] = rng.choice(_NASTY)
            case 3:
                del data[at : at + rng.randrange(1, 9)]
            case 4:
                data[at:at] = data[at : at + rng.randrange(1, 65)] * rng.randrange(1, 4)
            case 5:
                other = rng.choice(seeds)
                cut = rng.randrange(len(other) + 1)
                data[at:] = other[cut:]
            case 6:
                data[at : at + 4] = rng.choice((0, 1, 2**31, 2**32 - 1)).to_bytes(4, "big")
    return bytes(data[:MAX_INPUT_BYTES])


# --- atheris, in a process of its own ---------------------------------------------------------


def guided_fuzz(name: str, seed: int, folder: Path) -> Report:
    """Run the child of this module for one parser and read its last lines."""
    corpus = folder / re.sub(r"\W+", "-", name)
    corpus.mkdir()
    for number, data in enumerate(parsers()[name].seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    seconds = max(1, round(60 * minutes(1.0)))
    child = [sys.executable, "-m", "tests.torture.b3_fuzzing", name, str(seed), str(seconds)]
    done = subprocess.run(
        [*child, str(corpus)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + 300,
        check=False,
    )
    said = done.stdout + done.stderr
    cases = _last(r"stat::number_of_executed_units:\s+(\d+)", said)
    rss = _last(r"stat::peak_rss_mb:\s+(\d+)", said)
    crashes = [] if done.returncode == 0 else [said[-600:]]
    say("B3", f"{name}: {cases:,.0f} inputs, peak RSS {rss:.0f} MB, {len(crashes)} crashes")
    return Report(int(cases), crashes, rss)


def _last(pattern: str, text: str) -> float:
    found = re.findall(pattern, text)
    return float(found[-1]) if found else 0.0


def child(name: str, seed: str, seconds: str, corpus: str) -> None:
    """Fuzz one parser in this process; never returns."""
    import atheris  # type: ignore[import-untyped]

    parser = parsers()[name]

    def feed(data: bytes) -> None:
        result = outcome(parser, data)
        if result.startswith("crash"):
            raise AssertionError(result)

    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={MAX_RSS_MB}", "-timeout=10"]
    options = [f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", "-print_final_stats=1"]
    atheris.Setup(["fuzz", *limits, *options, f"-artifact_prefix={corpus}/", corpus], feed)
    atheris.Fuzz()


if __name__ == "__main__":
    import atheris as _atheris  # type: ignore[import-untyped]

    with _atheris.instrument_imports(include=["edge_sdk", "compression"]):
        for _name in [n for n in sys.modules if n.startswith(("edge_sdk", "compression"))]:
            del sys.modules[_name]
        del sys.modules["tests.torture.parsers"]
        from tests.torture.parsers import outcome, parsers
    child(*sys.argv[1:])
