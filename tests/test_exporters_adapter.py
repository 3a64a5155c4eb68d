"""exporters: an adapter file fits the slots, changes the model as torch says, and comes off."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from compression.int4_torch import load_slm
from edge_sdk.adapter_file import graph_inputs, write_adapter
from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import ReleaseManifest
from exporters.bundle import check_release, read_manifest, write_adapter_release
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny

RANK, ALPHA = 4, 8.0
IDS = np.arange(1, 30, dtype=np.int32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_tiny(folder / "hf")
    options = SlmOptions(accuracy_level=1)
    export_slm(folder / "hf", folder / "out", family="tiny", release="r1", options=options)
    return folder / "out"


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> ReleaseManifest:
    return read_manifest(bundle)


def _factors(manifest: ReleaseManifest, seed: int, *kinds: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    factors = {}
    for name, (out, width) in manifest.adapter_slots.items():
        if not kinds or name.endswith(kinds):
            factors[f"{name}.lora_A"] = rng.normal(0, 0.1, (RANK, width)).astype(np.float32)
            factors[f"{name}.lora_B"] = rng.normal(0, 0.1, (out, RANK)).astype(np.float32)
    return factors


def _logits(model: Any, adapters: Any = None, name: str = "") -> np.ndarray:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=64)
    generator = og.Generator(model, params)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(IDS)
    return generator.get_logits()[0, -1].copy()


def _torch_logits(bundle: Path, factors: dict[str, np.ndarray]) -> np.ndarray:
    model = load_slm(bundle, dtype=torch.float32)
    with torch.no_grad():
        for key in factors:
            if key.endswith(".lora_A"):
                linear = key.removesuffix(".lora_A")
                delta = factors[f"{linear}.lora_B"] @ factors[key] * (ALPHA / RANK)
                model.get_submodule(linear).weight += torch.from_numpy(delta)
        return model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0, -1].numpy()


@pytest.mark.parametrize("kinds", [(), ("q_proj", "v_proj")])
def test_genai_with_the_adapter_equals_torch_with_lora(
    bundle: Path, manifest: ReleaseManifest, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    factors = _factors(manifest, 1, *kinds)
    path = tmp_path / "a.onnx_adapter"

    write_adapter(factors, rank=RANK, alpha=ALPHA, slots=manifest.adapter_slots, path=path)
    model = og.Model(str(bundle))
    adapters = og.Adapters(model)
    adapters.load(str(path), "a")
    found = _logits(model, adapters, "a")

    np.testing.assert_allclose(found, _torch_logits(bundle, factors), atol=5e-3, rtol=5e-3)
    assert np.abs(found - _logits(model)).max() > 0.05


def test_without_the_adapter_the_same_model_gives_the_base_exactly(
    bundle: Path, manifest: ReleaseManifest, tmp_path: Path
) -> None:
    model = og.Model(str(bundle))
    before = _logits(model)
    adapters = og.Adapters(model)
    for name, seed in (("a", 1), ("b", 2)):
        path = tmp_path / f"{name}.onnx_adapter"
        factors = _factors(manifest, seed)
        write_adapter(factors, rank=RANK, alpha=ALPHA, slots=manifest.adapter_slots, path=path)
        adapters.load(str(path), name)

    a, b = _logits(model, adapters, "a"), _logits(model, adapters, "b")

    assert not np.array_equal(a, b)
    assert np.array_equal(_logits(model), before)
    assert np.array_equal(_logits(model, adapters, "a"), a)


def test_alpha_over_rank_is_folded_into_b(manifest: ReleaseManifest) -> None:
    factors = _factors(manifest, 1, "layers.0.self_attn.q_proj")
    name = "model.layers.0.self_attn.q_proj"

    inputs = graph_inputs(factors, rank=RANK, alpha=ALPHA, slots=manifest.adapter_slots)

    np.testing.assert_array_equal(inputs[f"{name}.lora_A"], factors[f"{name}.lora_A"].T)
    np.testing.assert_allclose(inputs[f"{name}.lora_B"], 2 * factors[f"{name}.lora_B"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {**f, "model.layers.9.mlp.up_proj.lora_A": np.zeros((4, 64))}, "fits no slot"),
        (lambda f: dict(list(f.items())[1:]), "only one of"),
        (lambda f: {**f, next(iter(f)): np.zeros((5, 64))}, "has shape"),
        (lambda f: {**f, next(iter(f)): np.full((4, 64), np.nan)}, "not finite"),
        (lambda f: {}, "no factors"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    manifest: ReleaseManifest, change: Any, message: str
) -> None:
    factors = change(_factors(manifest, 1, "layers.0.self_attn.q_proj"))

    with pytest.raises(ExportError, match=message):
        graph_inputs(factors, rank=RANK, alpha=ALPHA, slots=manifest.adapter_slots)


@pytest.mark.parametrize(("rank", "alpha"), [(0, 8.0), (65, 8.0), (4, 0.0), (4, float("nan"))])
def test_rank_and_alpha_have_limits(manifest: ReleaseManifest, rank: int, alpha: float) -> None:
    with pytest.raises(ExportError, match=r"rank|alpha"):
        graph_inputs({}, rank=rank, alpha=alpha, slots=manifest.adapter_slots, rank_max=64)


def test_an_adapter_release_holds_two_files_and_names_its_base(
    manifest: ReleaseManifest, tmp_path: Path
) -> None:
    made = write_adapter_release(
        tmp_path / "r2", manifest, _factors(manifest, 1), release="r2", rank=RANK, alpha=ALPHA
    )

    assert {p.name for p in (tmp_path / "r2").iterdir()} == {
        "symbiont.json",
        "adapter.onnx_adapter",
    }
    assert check_release(tmp_path / "r2", family="tiny", release="r2") == made
    assert (made.kind, made.base_release) == ("adapter", "r1")


def test_an_adapter_cannot_be_the_base_of_another(
    manifest: ReleaseManifest, tmp_path: Path
) -> None:
    factors = _factors(manifest, 1)
    made = write_adapter_release(
        tmp_path / "r2", manifest, factors, release="r2", rank=RANK, alpha=ALPHA
    )

    with pytest.raises(ExportError, match="whole release"):
        write_adapter_release(tmp_path / "r3", made, factors, release="r3", rank=RANK, alpha=ALPHA)
