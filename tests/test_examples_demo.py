"""The whole loop in small, as a user starts it: processes, a broker, sealed traffic, a report.

The demo runs twice with one seed: through a broker of the test's own behind a recording proxy, and
with the broker it starts itself. Both must give the same table, and the recording no secret.
"""

import json
import lzma
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.link.broker import find_mosquitto
from examples.demo import DATA, WORDS
from tests.recording_proxy import RecordingProxy

pytestmark = [pytest.mark.broker, pytest.mark.slow]
SMALL = ("--devices", "2", "--rounds", "2", "--steps", "8", "--samples", "16", "--seed", "5")


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return int(taken.getsockname()[1])


def demo(folder: Path, *options: str) -> dict[str, Any]:
    """Run the demo as a process; its JSON result."""
    done = subprocess.run(
        [
            sys.executable, "-m", "edge_sdk", "demo", *SMALL, *options, "--json",
            "--work", str(folder / "work"), "--report", str(folder / "report.html"),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The demo through somebody else's broker, and all bytes that broker saw."""
    mosquitto = find_mosquitto()
    assert mosquitto, "this test needs mosquitto; tests/system_packages.sh installs it"
    port = free_port()
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n")
    broker = subprocess.Popen([mosquitto, "-c", str(config)], stderr=subprocess.DEVNULL)
    recorder = RecordingProxy(port)
    try:
        result = demo(folder, "--broker", f"mqtt://127.0.0.1:{recorder.port}")
        yield result, recorder.recording
    finally:
        recorder.close()
        broker.terminate()
        broker.wait(10)


def test_the_loop_closes(recorded: tuple[dict[str, Any], bytes]) -> None:
    result, _ = recorded

    assert result["releases"][0]["release"] == "base"
    assert result["releases"][-1]["release"] == "base-distilled"
    for device in result["devices"]:
        names = [name for name, _ in device["accuracy"]]
        assert names == [r["release"] for r in result["releases"]], "measured every release"
        assert device["heldout"] > 100
        assert device["tokens_per_s"] > 0
        assert device["peak_mb"] > 0
        assert len(device["cosine"]) == 2
        assert min(device["cosine"]) > 0.1
        assert device["raw_bytes"] > 10 * device["sent_bytes"]
    assert len(result["llm"]) == 3
    assert result["wire_up"] > sum(d["sent_bytes"] for d in result["devices"])


def test_the_broker_saw_nothing_that_was_said(recorded: tuple[dict[str, Any], bytes]) -> None:
    _, traffic = recorded
    with lzma.open(DATA / "dolly_devices.jsonl.xz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    secrets = [text for text in texts if len(text) >= 20]
    words = [word for word in WORDS if len(word) > 8]

    assert len(traffic) > 1_000_000, "the models went through"
    assert b"device-1" in traffic, "the proxy did record"
    assert len(secrets) > 1000
    assert [s for s in (*secrets, *words) if s.encode() in traffic] == []


def test_the_same_seed_gives_the_same_table(
    folder: Path, recorded: tuple[dict[str, Any], bytes]
) -> None:
    first, _ = recorded
    (folder / "again").mkdir()

    second = demo(folder / "again")

    def table(result: dict[str, Any]) -> Any:
        rows = [{k: v for k, v in r.items() if "bytes" not in k} for r in result["rounds"]]
        per_device = [
            (d["name"], d["accuracy"], d["raw_bytes"], d["sent_bytes"], d["cosine"])
            for d in result["devices"]
        ]
        return per_device, result["llm"], rows

    assert table(first) == table(second)


def test_the_report_opens_in_a_browser_without_any_request(
    folder: Path, recorded: tuple[dict[str, Any], bytes]
) -> None:
    result, _ = recorded
    browser = next(
        (found for name in BROWSERS if (found := shutil.which(name))),
        None,
    )
    assert browser, "this test needs chromium; tests/system_packages.sh installs it"
    page = folder / "report.html"
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'browser'}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip

    source = page.read_text(encoding="utf-8")
    assert "http://" not in source
    assert "https://" not in source
    assert done.stdout.count("<svg") == 4
    assert done.stdout.count("<rect") >= 4 * len(result["devices"])
    for device in result["devices"]:
        assert f"{100 * device['accuracy'][-1][1]:.1f} %" in done.stdout


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--devices", "9"), "--devices 9 is outside 1 to 4"),
        (("--rounds", "0"), "--rounds 0 is outside 1 to 50"),
        (("--broker", "localhost"), "not mqtt://host:port"),
    ],
)
def test_a_bad_option_is_named(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk", "demo", *options, "--work", str(tmp_path / "work")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 2
    assert said in done.stderr
