"""The torture suite's runner: figures are independent, results merge, failures are told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture import __main__ as torture
from tests.torture.report import cell
from tests.torture.result import Result, Scale, minutes

GOOD = """
from tests.torture.result import Result, Scale
def run(scale, seed, folder):
    assert folder.is_dir() and not list(folder.iterdir())
    return Result("L1", "t", {"rate": 41.5}, "MB/s", "g", True, lost=0, doubled=0,
                  notes={"scale": str(scale), "seed": seed})
"""
CRASHES = "def run(scale, seed, folder):\n    raise OSError(f'no {folder}/x')\n"
DIES = "import os, signal\ndef run(*a):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
HANGS = "import threading\ndef run(*a):\n    threading.Event().wait()\n"


def put(package: Path, name: str, text: str) -> None:
    (package / f"{name}.py").write_text(text)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable copy of the runner whose figures are those that a test puts there."""
    source = Path(torture.__file__).parent
    package = tmp_path / "tests" / "torture"
    package.mkdir(parents=True)
    for name in ("__init__", "__main__", "machine", "report", "result"):
        (package / f"{name}.py").write_text((source / f"{name}.py").read_text())
    monkeypatch.chdir(tmp_path)
    return package


def run(*args: str) -> int:
    return subprocess.run(
        [sys.executable, "-m", "tests.torture", *args], capture_output=True, check=False
    ).returncode


def results(folder: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((folder / "torture.json").read_text())
    return found


def test_one_figure_writes_both_files(package: Path, tmp_path: Path) -> None:
    put(package, "l1_good", GOOD)

    status = run("--only", "l1", "--full", "--seed", "9", "--out", "out")

    assert status == 0
    line = results(tmp_path / "out")["L1"]
    assert line["value"] == {"rate": 41.5}
    assert line["notes"] == {"scale": "full", "seed": 9}
    assert line["command"] == "python -m tests.torture --only L1 --full --seed 9"
    assert (line["lost"], line["doubled"], line["passed"]) == (0, 0, True)
    page = (tmp_path / "out" / "torture.md").read_text()
    assert "| L1 | t | rate 41.5 | MB/s | g | yes | 0 | 0 | `python -m tests.torture" in page


def test_a_figure_that_fails_in_any_way_does_not_stop_the_others(
    package: Path, tmp_path: Path
) -> None:
    put(package, "l1_good", GOOD)
    put(package, "f1_crashes", CRASHES)
    put(package, "f2_dies", DIES)
    put(package, "f3_hangs", HANGS)

    status = run("--only", "F1,F2,F3,F4,L1", "--limit", "3", "--out", "out")

    assert status == 1
    found = results(tmp_path / "out")
    assert list(found) == ["L1", "F1", "F2", "F3", "F4"]
    assert [code for code, line in found.items() if line["passed"]] == ["L1"]
    whys = {code: dict(line["notes"]).get("failure", "") for code, line in found.items()}  # type: ignore[call-overload]
    assert whys["F1"] == "OSError: no FOLDER/x"
    assert "ended with -9" in whys["F2"]
    assert "within 3 s" in whys["F3"]
    assert "missing" in whys["F4"]


def test_a_run_keeps_the_lines_of_earlier_runs(package: Path, tmp_path: Path) -> None:
    put(package, "l1_good", GOOD)
    torture.keep(tmp_path / "out", {"B1": line("B1"), "L1": line("L1", passed=False)})

    run("--only", "L1", "--out", "out")

    found = results(tmp_path / "out")
    assert [code for code, entry in found.items() if entry["passed"]] == ["L1", "B1"]


def test_a_short_run_leaves_the_full_results_alone(package: Path, tmp_path: Path) -> None:
    put(package, "l1_good", GOOD)
    run("--only", "L1", "--full")
    before = (tmp_path / "tests/results/torture.json").read_bytes()

    run("--only", "L1", "--short")

    assert (tmp_path / "tests/results/torture.json").read_bytes() == before
    assert results(tmp_path / "tests/results/short")["L1"]["scale"] == "short"


def test_an_unknown_code_is_named() -> None:
    with pytest.raises(SystemExit, match="no figure X9; there are L1"):
        torture.main(["--only", "X9"])


def test_the_list_names_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.main(["--list"]) == 0

    assert len(capsys.readouterr().out.splitlines()) == len(torture.FIGURES)


def test_minutes_reach_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORTURE_MINUTES", raising=False)
    assert minutes(1.0) == 1.0

    monkeypatch.setenv("TORTURE_MINUTES", "30")

    assert minutes(1.0) == 30.0


def test_cells_are_short_and_cannot_break_the_table() -> None:
    assert cell({"a": 41.23456, "b": True}) == "a 41.23, b yes"
    assert cell(1234567) == "1,234,567"
    assert cell("x|y\nz") == "x\\|y z"
    assert cell(None) == "-"


def line(code: str, *, passed: bool = True) -> dict[str, object]:
    result = Result(code, "t", 1, "u", "g", passed)
    return torture.entry_of(result, Scale.FULL, 7, 1.0)
