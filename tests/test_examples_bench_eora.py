"""examples: bench_eora keeps what it has measured, and a cell's arms keep the order of theory."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compression.eora import branch, eigen_root, output_error
from compression.eora_torch import branches_on
from examples import bench_eora, eora_lab
from examples.eora_lab import FIELDS, SCHEMES, Lab, Settings
from examples.eora_speed import speed
from examples.eora_texts import requests, windows

SETTINGS = Settings(Path("nowhere"), (4,), windows=4)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    """slm-a; requests stand in for WikiText-2, which is no part of the repository."""
    texts = requests("dolly_public.jsonl.xz")[:300]
    monkeypatch.setattr(eora_lab, "wikitext", lambda *_: texts)
    made = Lab("slm-a", SCHEMES["int3 g32"], SETTINGS)
    made.own_texts = texts
    return made


def test_every_arm_changes_the_model_and_comes_off(lab: Lab) -> None:
    ids, _ = windows(lab.tokenizer, requests("dolly_devices.jsonl.xz", "heldout")[:40], 1)
    lab.shrink()

    with torch.inference_mode():
        base = lab.model(ids[:, :32]).logits
        for kind, rank, make in lab.arms(task=False)[1:]:
            with branches_on(lab.model, make()):
                assert not torch.equal(lab.model(ids[:, :32]).logits, base), (kind, rank)
            assert torch.equal(lab.model(ids[:, :32]).logits, base), (kind, rank)


def test_on_real_inputs_eora_has_the_smallest_output_error_at_every_layer(lab: Lab) -> None:
    lab.shrink()

    for group in lab.grouped[:4]:
        C, root = lab.moments[group[0]], lab.roots[group[0]]
        for name in group:
            D = lab.errors[name]
            ours, blind = (output_error(D, C, *branch(D, 4, r)) for r in (root, None))
            assert ours < blind < output_error(D, C)
            assert np.isfinite(eigen_root(C)).all()


def test_a_compression_that_looks_at_inputs_starts_from_the_original_each_time(
    lab: Lab,
) -> None:
    lab.scheme = SCHEMES["2:4 sparsegpt"]
    name = lab.names[0]

    first, second = (lab.walk(2, eigen_root) for _ in range(2))

    assert all(np.array_equal(first[key], second[key]) for key in first)
    kept = lab.model.get_submodule(name).weight.reshape(-1, 4)
    assert int((kept != 0).sum(1).max()) == 2


def test_bits_count_codes_scales_and_the_branch(lab: Lab) -> None:
    shapes = [W.shape for W in lab.original.values()]
    values = sum(out * width for out, width in shapes)

    assert lab.bits(0) == pytest.approx(3 + 16 / 32)
    assert lab.bits(8) - lab.bits(0) == pytest.approx(16 * 8 * sum(map(sum, shapes)) / values)


def _rows(model: str, weights: str, value: str) -> list[dict[str, str]]:
    return [{"model": model, "weights": weights, "branch": "none", "wikitext2_bpb": value}]


def test_measuring_a_part_replaces_that_part_only(tmp_path: Path) -> None:
    path = tmp_path / "eora.csv"
    bench_eora.write(path, FIELDS, _rows("slm-a", "2:4", "1"))
    bench_eora.write(path, FIELDS, _rows("slm-a", "int4 g32", "2"))

    bench_eora.write(path, FIELDS, _rows("slm-a", "2:4", "3"))

    with path.open(newline="") as file:
        found = [(row["weights"], row["wikitext2_bpb"]) for row in csv.DictReader(file)]
    assert found == [("int4 g32", "2"), ("2:4", "3")]


@pytest.mark.parametrize("wrong", [["--models", "gpt"], ["--weights", "int5"], ["--ranks", "x"]])
def test_wrong_names_are_refused(wrong: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench_eora.parse(wrong)

    assert wrong[1] in capsys.readouterr().err


def test_a_missing_corpus_is_named(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "o.csv"), "--jobs", "1"]

    code = bench_eora.main([*arguments, "--quick", "--weights", "int8 g32", "--what", "text"])

    assert code == 1
    assert "wikitext2.valid.txt.xz is missing" in capsys.readouterr().err


def test_speed_names_sizes_and_times() -> None:
    base, with_branch = speed("slm-a", (4,), tokens=4, repeats=1)

    assert (base["branch_kb"], with_branch["rank"]) == ("0", "4")
    assert float(with_branch["ms_per_token"]) > 0
    assert int(with_branch["branch_kb"]) < int(base["bundle_kb"])
