"""The short forms of the fault figures: kills, bad networks, full disks and power cuts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.link.broker import find_mosquitto
from tests.torture import (
    f1_coordinator_kills,
    f2_broker_kills,
    f3_device_kills,
    f4_network,
    f6_disk_full,
    f7_power,
)
from tests.torture.result import Result, Run, Scale

SEED = 7
ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.broker,
    pytest.mark.slow,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]


@pytest.mark.parametrize(
    "figure",
    [f1_coordinator_kills.run, f2_broker_kills.run, f3_device_kills.run, f4_network.run],
    ids=["F1", "F2", "F3", "F4"],
)
def test_nothing_is_lost(figure: Run, tmp_path: Path) -> None:
    held(figure(Scale.SHORT, SEED, tmp_path))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_power_cut_at_every_fsync_leaves_a_good_store(tmp_path: Path) -> None:
    held(f7_power.run(Scale.SHORT, SEED, tmp_path))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_store_that_does_not_sync_fails_the_power_cut(tmp_path: Path) -> None:
    """The figure itself can fail: without fsync before the Done, acknowledged updates are lost."""
    for package in ("edge_sdk", "coordinator", "exporters", "compression", "tests/torture"):
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=hidden)
    database = tmp_path / "edge_sdk/store/database.py"
    text = database.read_text()
    database.write_text(text.replace("synchronous = FULL", "synchronous = OFF"))
    assert database.read_text() != text

    told = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--only", "F7", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert told.returncode == 1
    assert "lost" in told.stderr


def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    try:
        (tmp_path / "probe").mkdir()
        with f6_disk_full.small_disk(tmp_path / "disk"):
            pass
    except ConfigError as exc:
        pytest.skip(str(exc))

    held(f6_disk_full.run(Scale.SHORT, SEED, tmp_path / "probe"))


def held(result: Result) -> None:
    assert result.passed, str(result)
    assert (result.lost, result.doubled) == (0, 0)
