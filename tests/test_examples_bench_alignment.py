"""The alignment benchmark: ours and the plain reference agree, and vocabulary files are read."""

import json
import lzma
from pathlib import Path

import pytest

from examples import bench_alignment
from examples.bench_alignment import pieces_of, vocabulary_of


def test_ours_and_the_reference_agree_and_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--texts", "12", "--tokens", "40", "--part", "3", "--batch", "0", "--json"]

    assert bench_alignment.main(small) == 0

    lines = json.loads(capsys.readouterr().out)
    assert [line[0].split()[0] for line in lines] == ["MinED", "DTW,", "greedy,", "carry"]
    assert all(line[1] >= 0 for line in lines)


def test_vocabulary_files_of_three_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"model": 1, "\u0120the": 0}))
    (tmp_path / "b.txt").write_text("the\n##ize\n")
    piece = "▁the".encode()
    message = b"\x0a" + bytes([len(piece)]) + piece + b"\x15\0\0\0\0"
    model = b"\x0a" + bytes([len(message)]) + message
    (tmp_path / "c.model.xz").write_bytes(lzma.compress(model * 2 + b"\x12\0"))

    assert vocabulary_of(tmp_path / "a.json").surfaces == (b" the", b"model")
    assert vocabulary_of(tmp_path / "b.txt").surfaces == (b" the", b"ize")
    assert vocabulary_of(tmp_path / "c.model.xz").surfaces == (b" the", b" the")
    assert list(pieces_of(b"")) == []
