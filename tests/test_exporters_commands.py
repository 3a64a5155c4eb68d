"""exporters: `symbiont export` says what it made, and names what it cannot use."""

import argparse
import json
from pathlib import Path

import pytest

from edge_sdk.errors import ExportError
from exporters import commands
from tests.exporters_tiny import save_tiny


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    parsed = parser.parse_args(["export", *arguments])
    return int(parsed.run(parsed))


NAMES = ("--family", "tiny", "--release", "r1")


def test_an_export_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "hf")
    (tmp_path / "text").write_text("A real line.\n\nAnother one.\n", encoding="utf-8")
    capsys.readouterr()

    code = _run(
        *(str(tmp_path / "hf"), str(tmp_path / "out"), *NAMES, "--json", "--exact"),
        *("--text", str(tmp_path / "text"), "--threads", "1"),
    )

    found = json.loads(capsys.readouterr().out)
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert code == 0
    assert (found["release"], found["adapter_slots"]) == ("r1", 14)
    assert found["logit_error"] < 1e-3
    assert genai["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no config\.json"):
        _run(str(tmp_path / "absent"), str(tmp_path / "out"), *NAMES)


def test_a_hub_id_is_fetched_and_a_refusal_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def give(model: str, **_: object) -> str:
        if model == "org/good":
            return str(tmp_path)
        raise OSError("no such repository\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)

    assert commands.find_model("org/good") == tmp_path
    with pytest.raises(ExportError, match=r"org/bad.*no such repository$"):
        commands.find_model("org/bad")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\n  \n"])
def test_parity_text_must_be_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)

    with pytest.raises(ExportError, match="parity text"):
        _run("x", str(tmp_path / "out"), *NAMES, "--text", str(tmp_path / "text"))


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-x", "a" * 129])
def test_names_that_cannot_be_published_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="not a name"):
        _run("x", str(tmp_path / "out"), f"--family={name}", "--release=r")
