"""exporters: a bundle's EoRA branch agrees with torch, helps on held-back text, and comes off."""

import argparse
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from compression.eora import Factors, concatenate
from compression.eora_torch import branches_on
from compression.int4_torch import load_slm
from edge_sdk.adapter_file import graph_inputs, write_adapter
from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import ADAPTER_FILE, ReleaseManifest
from examples.models import materialize
from exporters import eora_commands
from exporters.bundle import check_release, read_manifest
from exporters.eora import Figures, calibrate_bundle, export_eora, load_both, windows
from exporters.parity import empty_cache_feed, open_session
from exporters.slm import SlmOptions, export_slm

RANK = 8
EXACT = SlmOptions(accuracy_level=1, compensate=False)
"""Rounded to nearest: compensated weights leave a branch less to give back."""
REQUESTS = Path(__file__).resolve().parent.parent / "examples" / "data" / "dolly_public.jsonl.xz"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with lzma.open(REQUESTS, "rt", encoding="utf-8") as file:
        return [f"Request: {json.loads(line)['text']}" for line in file][:400]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return materialize("slm-a")


@pytest.fixture(scope="module")
def bundle(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eora") / "bundle"
    export_slm(model_dir, out, family="slm-a", release="r1", options=EXACT)
    return out


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> ReleaseManifest:
    return read_manifest(bundle)


@pytest.fixture(scope="module")
def release(
    bundle: Path, model_dir: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ReleaseManifest, Figures]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("release") / "r2"
    made, figures = export_eora(bundle, model_dir, out, release="r2", texts=texts, rank=RANK)
    return out, made, figures


@pytest.fixture(scope="module")
def factors(bundle: Path, model_dir: Path, manifest: ReleaseManifest, texts: list[str]) -> Factors:
    rows = windows(bundle, texts[:60], context=manifest.context)
    _, model, errors = load_both(bundle, model_dir, manifest)
    return calibrate_bundle(model, errors, rows, rank=RANK)


def _logits(folder: Path, ids: np.ndarray, extra: dict[str, np.ndarray]) -> np.ndarray:
    session = open_session(folder)
    return session.run(["logits"], empty_cache_feed(folder, session, ids) | extra)[0][0]


def _inputs(manifest: ReleaseManifest, factors: Factors, rank: int) -> dict[str, np.ndarray]:
    return graph_inputs(factors, rank=rank, alpha=float(rank), slots=manifest.adapter_slots)


def test_the_branch_brings_the_bundle_nearer_to_the_model_on_text_it_has_not_seen(
    release: tuple[Path, ReleaseManifest, Figures],
) -> None:
    _, _, figures = release

    assert figures.kl_after < 0.8 * figures.kl_before
    assert figures.logit_error < 1e-3
    assert figures.held_out_tokens >= 1000


def test_the_release_is_an_adapter_of_the_bundle(
    release: tuple[Path, ReleaseManifest, Figures], manifest: ReleaseManifest
) -> None:
    out, made, _ = release

    assert check_release(out, family="slm-a", release="r2") == made
    assert (made.kind, made.base_release, made.lineage["method"]) == ("adapter", "r1", "eora")
    values = sum(RANK * sum(shape) for shape in manifest.adapter_slots.values())
    assert 4 * values <= made.files[ADAPTER_FILE].bytes <= 4 * values + 32_768


def test_onnx_runtime_with_the_branch_equals_torch(
    bundle: Path, manifest: ReleaseManifest, factors: Factors
) -> None:
    ids = np.arange(300, 340, dtype=np.int64)[None]
    model = load_slm(bundle, dtype=torch.float32)

    with torch.inference_mode(), branches_on(model, factors):
        expected = model(torch.from_numpy(ids)).logits[0].numpy()
    found = _logits(bundle, ids, _inputs(manifest, factors, RANK))

    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_task_adapter_adds_to_the_branch_in_one_adapter(
    bundle: Path, manifest: ReleaseManifest, factors: Factors
) -> None:
    rng = np.random.default_rng(4)
    task: Factors = {}
    for name, (out, width) in manifest.adapter_slots.items():
        if name.endswith(("q_proj", "v_proj")):
            task[f"{name}.lora_A"] = rng.normal(0, 0.1, (4, width)).astype(np.float32)
            task[f"{name}.lora_B"] = rng.normal(0, 0.1, (out, 4)).astype(np.float32)
    ids = np.arange(300, 340, dtype=np.int64)[None]
    model = load_slm(bundle, dtype=torch.float32)

    both, rank = concatenate((factors, 1.0), (task, 2.0))
    with torch.inference_mode(), branches_on(model, factors), branches_on(model, task, scale=2.0):
        expected = model(torch.from_numpy(ids)).logits[0].numpy()
    found = _logits(bundle, ids, _inputs(manifest, both, rank))

    assert rank == RANK + 4
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_without_the_branch_the_same_loaded_model_is_the_base_to_the_last_bit(
    bundle: Path, manifest: ReleaseManifest, factors: Factors, tmp_path: Path
) -> None:
    def last(name: str = "") -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=64)
        generator = og.Generator(model, params)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.arange(300, 330, dtype=np.int32))
        return generator.get_logits()[0, -1].copy()

    path = tmp_path / "eora.onnx_adapter"
    slots = manifest.adapter_slots
    write_adapter(factors, rank=RANK, alpha=float(RANK), slots=slots, path=path)
    model = og.Model(str(bundle))
    adapters = og.Adapters(model)
    before = last()
    adapters.load(str(path), "eora")

    with_branch, after = last("eora"), last()

    assert not np.array_equal(with_branch, before)
    assert np.array_equal(after, before)


def test_a_bundle_of_another_model_is_refused(
    bundle: Path, tmp_path: Path, texts: list[str]
) -> None:
    with pytest.raises(ExportError, match="was not made from"):
        export_eora(bundle, materialize("llm"), tmp_path / "x", release="x", texts=texts)
    with pytest.raises(ExportError, match="is not a model folder"):
        export_eora(bundle, tmp_path / "none", tmp_path / "x", release="x", texts=texts)

    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("rank", "words", "message"),
    [(0, 500, "rank 0"), (65, 500, "rank 65"), (8, 3, "tokens; at least")],
)
def test_ranks_and_too_little_text_are_named(
    bundle: Path, model_dir: Path, tmp_path: Path, rank: int, words: int, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_eora(
            bundle, model_dir, tmp_path / "x", release="x", texts=["word"] * words, rank=rank
        )


def test_a_branch_that_does_not_help_is_not_written(
    bundle: Path, model_dir: Path, tmp_path: Path
) -> None:
    """The original is the bundle's own int4 weights: nothing was lost, nothing can come back."""
    same = Path(shutil.copytree(model_dir, tmp_path / "same"))
    load_slm(bundle, dtype=torch.float32).save_pretrained(same)

    with pytest.raises(ExportError, match="does not help"):
        export_eora(bundle, same, tmp_path / "x", release="x", texts=["the harbour was quiet"] * 60)


def test_the_command_prints_one_object(
    bundle: Path,
    model_dir: Path,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    eora_commands.register(parser.add_subparsers())
    (tmp_path / "text").write_text("\n".join(texts[:120]), encoding="utf-8")
    capsys.readouterr()

    arguments = parser.parse_args(
        ["eora", str(bundle), str(model_dir), str(tmp_path / "out"), "--release", "r3",
         "--text", str(tmp_path / "text"), "--rank", "2", "--json"]
    )  # fmt: skip
    code = arguments.run(arguments)

    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert code == 0
    assert (found["release"], found["base_release"], found["rank"]) == ("r3", "r1", 2)
    assert found["kl_after"] < found["kl_before"]


def test_a_text_file_that_cannot_be_read_is_named(bundle: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    eora_commands.register(parser.add_subparsers())
    arguments = parser.parse_args(
        ["eora", str(bundle), str(bundle), str(tmp_path / "out"), "--release", "r3",
         "--text", str(tmp_path / "absent")]
    )  # fmt: skip

    with pytest.raises(ExportError, match="absent cannot be read"):
        arguments.run(arguments)
