"""The short examples of embedding run from a clone, say what they promise, and stay short."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from edge_sdk.runtime import SlmSession
from tests.chat_world import world

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ["sensor_loop", "notes_app", "fastapi_app"]


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def promised(name: str) -> list[str]:
    """The lines of output in an example's docstring, its last paragraph."""
    doc = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    return doc.strip().split("\n\n")[-1].splitlines()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_under_forty_lines(name: str) -> None:
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()

    assert len(lines) < 40


def test_the_sensor_loop_learns_from_what_it_collected() -> None:
    """The exact counts may differ with the processor; that it learns may not."""
    lines = run("sensor_loop").splitlines()

    counts = [[int(number) for number in re.findall(r"\d+", line)] for line in lines]
    (many, right_before), (few, right_after) = counts
    assert (many, few) == (64, 40)
    assert right_before / many < 0.6
    assert right_after / few > 0.9
    shapes = [re.sub(r"\d+", "N", line) for line in promised("sensor_loop")]
    assert [re.sub(r"\d+", "N", line) for line in lines] == shapes


def test_the_notes_application_keeps_its_promise() -> None:
    found, expected = run("notes_app").splitlines(), promised("notes_app")

    assert [line.split()[0] for line in found] == [line.split()[0] for line in expected]
    assert found[-1] == expected[-1]


@pytest.fixture
def application() -> Iterator[str]:
    """The address of the FastAPI application, which runs with the tests' tiny model."""
    pytest.importorskip("fastapi")
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "examples.fastapi_app:app", "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"BUNDLE": str(world().bundle)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                yield found[1]
                break
        process.terminate()
        rest = process.stderr.read()
    assert process.wait(30) == 0 or "Finished server process" in rest


def test_the_fastapi_application_streams_and_refuses(application: str) -> None:
    with openai.DefaultHttpxClient(base_url=application, timeout=30) as client:
        with client.stream("POST", "/story", json={"start": "hello"}) as answer:
            pieces = list(answer.iter_text())
        refused = client.post("/story", json={"start": ""})

    with SlmSession(world().bundle) as session:
        assert "".join(pieces) == session.generate("hello", max_tokens=40)
    assert answer.status_code == 200
    assert refused.status_code == 400
    assert "prompt is empty" in refused.json()["detail"]
