"""Runs part of the test suite in a process of its own and returns what its watchers saw.

Knows `tests/conftest.py`'s report. Does not know what the tests do.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPORT = "SYMBIONT_KEY_SCAN"


def run_watched(tests: Sequence[str], folder: Path, *, limit_s: float) -> dict[str, Any]:
    """Run test files by name and return the watchers' report with the outcome of the tests."""
    report = folder / "watched.json"
    names = [f"tests/{name}" for name in tests if (ROOT / "tests" / name).exists()]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *names]
    command += [f"--basetemp={folder / 'tmp'}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, REPORT: str(report)},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    seen: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return {**seen, "test files": len(names), "status": done.returncode, "tests": last}
