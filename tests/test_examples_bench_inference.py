"""examples: bench_inference times ours, names what is missing, and ends with one JSON line."""

import json
from pathlib import Path

import numpy as np
import pytest

from examples import bench_inference as bench
from examples.inference import subjects
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in the place of `llm`, with a context for the long prompt."""
    folder = save_tiny(tmp_path / "tiny", max_position_embeddings=512)
    monkeypatch.setattr(subjects, "materialize", lambda name: folder)

    def exact(source: Path, out: Path, block: int | None, _: bool) -> None:
        options = SlmOptions(block=block, accuracy_level=1)  # random weights need 32 bits
        export_slm(source, out, family="t", release="r", options=options)

    monkeypatch.setattr(subjects, "_bundle", exact)


def test_ours_and_genai_are_timed_and_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho 'no module named llama_cpp' >&2; exit 1\n")
    bare.chmod(0o755)

    options = "--models llm --runtimes symbiont genai llama.cpp --rounds 2 --tokens 4 --threads 1"
    paths = ["--cache", str(tmp_path / "cache"), "--peer-python", str(bare)]
    status = bench.main([*options.split(), *paths, "--json"])

    said = capsys.readouterr().out
    found = json.loads(said.strip().splitlines()[-1])
    assert status == 0
    assert "missing: llama.cpp (no module named llama_cpp); to install it: pip install" in said
    assert found["missing"] == ["llama.cpp"]
    assert [row["runtime"] for row in found["rows"]] == ["symbiont", "genai"]
    for row in found["rows"]:
        keys = {"runtime", "model", "tokens_per_s", "first_token_ms", "peak_mb", "disk_mb"}
        assert row.keys() == keys
        assert min(row[key] for key in keys - {"runtime", "model"}) > 0


def test_prompts_have_as_many_tokens_as_they_say(tmp_path: Path) -> None:
    request = bench.request_for("llm", tmp_path, 4)

    assert (len(request["ids"]), len(request["warm"])) == (bench.PROMPT, bench.WARM)


def test_a_runtime_that_fails_says_why(tmp_path: Path) -> None:
    import sys

    with pytest.raises(subjects.SubjectError, match="genai_config"):
        bench.Worker(Path(sys.executable), "genai", str(tmp_path), 1)


def test_gguf_rows_are_the_neighbouring_pairs_of_each_head() -> None:
    source = (subjects._HERE / "to_gguf.py").read_text()
    body = source[source.index("def in_pairs") : source.index("def write")]
    scope: dict[str, object] = {"np": np}
    exec(body, scope)  # the file itself imports llama_cpp and gguf
    rows = np.arange(16).reshape(8, 2)  # two heads of four rows

    pairs = scope["in_pairs"](rows, 2)  # type: ignore[operator]

    assert pairs[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
