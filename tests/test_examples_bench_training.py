"""The training benchmark runs each way in a process of its own and says what it cannot run."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_quick_run_ends_with_its_rows_as_json() -> None:
    done = subprocess.run(
        [sys.executable, "examples/bench_training.py", "--quick", "--json", "--rounds", "1",
         "--tokens", "16", "--ways", "fly"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip

    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    ours = {row["runtime"]: row for row in rows if row["model"] == "slm-a"}
    assert set(ours) == {"ours, 16-bit", "ours, int4 on the fly", "peft, 16-bit"}
    assert ours["ours, 16-bit"]["ratio"] == ours["peft, 16-bit"]["to_peft"] == 1.0
    assert ours["ours, int4 on the fly"]["weights_mb"] < ours["ours, 16-bit"]["weights_mb"] / 2
    assert all(row["peak_mb"] > row["weights_mb"] for row in ours.values())
    named = [row for row in rows if "missing" in row]
    assert all("pip install" in row["missing"] for row in named)
