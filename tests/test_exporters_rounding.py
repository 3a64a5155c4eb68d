"""exporters: int4 weights are rounded so that layers' outputs change least."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.int4 import WeightFile
from compression.quantize import rtn
from edge_sdk.errors import ExportError
from exporters import calibration, rounding
from exporters.calibration import written_by
from exporters.parity import ParityLimits
from exporters.rounding import Rounded, block_scales, compensated, lost
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny


def _layer(out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with some large values, and second moments of correlated inputs."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(5)
    W = torch.randn(out, width, generator=rng) * torch.rand(out, 1, generator=rng).exp()
    mixing = torch.randn(width, width // 2, generator=rng)
    X = torch.randn(4 * width, width // 2, generator=rng) @ mixing.T
    return W, X.T @ X


def _nearest(W: torch.Tensor, block: int) -> torch.Tensor:
    return torch.from_numpy(rtn(W.numpy(), 4, block=block)).float()


@pytest.mark.parametrize("width", [128, 96, 40])
def test_outputs_change_less_than_with_the_nearest_values(width: int) -> None:
    W, C = _layer(48, width)

    found = compensated(W, C, 64)

    assert lost(W, found.values(width), C) < 0.5 * lost(W, _nearest(W, 64), C)
    assert lost(W, found.values(width), C) < lost(W, _nearest(W, 32), C)


def test_a_scale_is_no_worse_than_that_of_the_largest_value() -> None:
    W, _ = _layer(64, 128)

    scales = block_scales(W, torch.ones(128), 32).repeat_interleave(32, 1)

    kept = (W / scales).round().clamp(-8, 7) * scales
    error, nearest = (float((W - Wq).square().sum()) for Wq in (kept, _nearest(W, 32)))
    assert error < 0.95 * nearest


def test_what_lies_on_the_grid_stays_as_it_is() -> None:
    rng = torch.Generator().manual_seed(1)
    steps = torch.randint(-8, 8, (5, 64), generator=rng).float()
    steps[:, ::32] = -8.0
    W = steps * torch.tensor([0.5, -0.25, 2.0, -1.0, 0.125])[:, None]

    found = compensated(W, torch.eye(64), 32)

    assert torch.allclose(found.values(64), W, atol=1e-6)


def test_a_layer_of_zeros_stays_zero_and_padding_is_the_code_of_zero() -> None:
    found = compensated(torch.zeros(3, 40), torch.eye(40), 32)

    assert torch.equal(found.values(40), torch.zeros(3, 40))
    assert bool((found.codes == rounding.ZERO).all())
    assert bool(torch.isfinite(found.scales).all())


def test_two_codes_share_a_byte_low_first() -> None:
    found = Rounded(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), torch.ones(1, 1))

    assert found.packed().tolist() == [[0x21, 0x0F]]


# ---- bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model exported twice, in folders `nearest` and `compensated`."""
    folder = tmp_path_factory.mktemp("rounding")
    save_tiny(folder / "hf")
    for name, compensate in (("nearest", False), ("compensated", True)):
        options = SlmOptions(accuracy_level=1, compensate=compensate)
        export_slm(folder / "hf", folder / name, family="t", release="r", options=options)
    return folder


def test_layers_of_a_bundle_answer_more_like_the_original(bundles: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bundles / "hf", dtype=torch.float32).eval()
    linears = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    with torch.no_grad():
        ids = written_by(model, rows=16, seed=99)  # other text than the export's
        read: dict[str, torch.Tensor] = {}
        for name, layer in linears.items():
            layer.register_forward_pre_hook(
                lambda _, x, name=name: read.__setitem__(name, x[0].flatten(0, 1))
            )
        model(input_ids=ids)

    @torch.no_grad()
    def error(name: str) -> float:
        weights, total = WeightFile(bundles / name), 0.0
        for layer, x in read.items():
            W, Wq = linears[layer].weight, weights.dequantize(f"{layer}.weight")
            change = (W - torch.from_numpy(Wq)) @ x.T
            total += float(change.square().sum() / (W @ x.T).square().sum())
        return total

    assert error("compensated") < 0.8 * error("nearest")


def test_only_codes_and_scales_change(bundles: Path) -> None:
    index, graph, data = (
        [(bundles / name / file).read_bytes() for name in ("nearest", "compensated")]
        for file in ("weights.json", "answer.onnx", "model.onnx.data")
    )
    tensors = json.loads(index[0])["tensors"]
    before, after = (np.frombuffer(raw, np.uint8).copy() for raw in data)

    assert index[0] == index[1]
    assert graph[0] == graph[1]
    assert not np.array_equal(before, after)
    for name, entry in tensors.items():
        if entry["kind"] == "blockwise" and "_proj" in name:
            for offset, length in (entry["packed"][:2], entry["scales"][:2]):
                before[offset : offset + length] = after[offset : offset + length]
    assert np.array_equal(before, after)


def test_an_export_gives_the_same_bytes_again(bundles: Path, tmp_path: Path) -> None:
    options = SlmOptions(accuracy_level=1)
    export_slm(bundles / "hf", tmp_path / "again", family="t", release="r", options=options)

    first, again = (p / "model.onnx.data" for p in (bundles / "compensated", tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


def test_moments_over_the_ceiling_are_taken_in_parts(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOMENT_BYTES", 1)

    options = SlmOptions(accuracy_level=1)
    export_slm(bundles / "hf", tmp_path / "parts", family="t", release="r", options=options)

    first, parts = (p / "model.onnx.data" for p in (bundles / "compensated", tmp_path / "parts"))
    assert first.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize(("width", "block"), [(64, 32), (256, 64)])
def test_blocks_are_larger_where_the_model_is_wide(tmp_path: Path, width: int, block: int) -> None:
    save_tiny(tmp_path / "hf", hidden_size=width, num_hidden_layers=1)

    options = SlmOptions(accuracy_level=1)
    export_slm(tmp_path / "hf", tmp_path / "out", family="t", release="r", options=options)

    assert _blocks(tmp_path / "out") == {block}


def test_a_model_that_does_not_agree_with_large_blocks_gets_smaller_ones(tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf", hidden_size=256, num_hidden_layers=1)
    between = ParityLimits(logit_error=0.033)  # 0.035 with blocks of 64, 0.031 with 32
    options = SlmOptions(compensate=False)
    names = {"family": "t", "release": "r"}

    export_slm(tmp_path / "hf", tmp_path / "out", options=options, limits=between, **names)

    assert _blocks(tmp_path / "out") == {32}
    large = SlmOptions(compensate=False, block=64)
    with pytest.raises(ExportError, match="disagrees with torch"):
        export_slm(tmp_path / "hf", tmp_path / "no", options=large, limits=between, **names)


def _blocks(bundle: Path) -> set[int]:
    graph = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    return {
        attribute.i
        for node in graph.graph.node
        for attribute in node.attribute
        if node.op_type == "MatMulNBits" and attribute.name == "block_size"
    }


def test_a_graph_of_other_weights_is_refused(bundles: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    graph = onnx.load(str(bundles / "nearest" / "model.onnx"), load_external_data=False)
    from exporters.slm import _torch_names
    from exporters.weights_index import layer_linears

    linears = layer_linears(graph, _torch_names(tmp_path / "hf")[1])
    with torch.no_grad():
        layer = model.get_submodule("model.layers.1.mlp.down_proj")
        layer.weight.copy_(layer.weight.flip(0))
    model.save_pretrained(tmp_path / "hf")
    before = (bundles / "nearest" / "model.onnx.data").read_bytes()
    (tmp_path / "model.onnx.data").write_bytes(before)

    with pytest.raises(ExportError, match=r"layers.1/mlp/down_proj.*other weights"):
        calibration.round_weights(tmp_path, graph, linears, tmp_path / "hf")


def test_a_model_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(float("nan"))

    with pytest.raises(ExportError, match="finite"), torch.inference_mode():
        written_by(model)
