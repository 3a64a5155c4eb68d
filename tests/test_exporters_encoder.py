"""exporters: an encoder becomes one int8 graph that says what torch says of the same weights."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from compression.int4 import WeightFile
from compression.int4_torch import load_slm
from edge_sdk import cli
from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import decode_golden
from exporters import encoder_parity
from exporters.bundle import check_release
from exporters.encoder import GRAPH_FILE, EncoderLimits, export_encoder
from tests.encoders_tiny import TEXTS, exported, save_bert, save_modernbert, source
from tests.exporters_tiny import save_tiny

FAMILIES = ("bert", "modernbert")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_agrees_with_torch_on_the_same_int8_weights(family: str) -> None:
    bundle = exported(family)

    manifest = check_release(bundle, family="tiny", release="r1")

    assert manifest.kind == "encoder"
    assert manifest.parity["logit_error"] <= 0.02
    assert manifest.parity["agreement"] == 1.0
    assert manifest.parity["texts"] == len(TEXTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_one_operator_a_layer_and_the_graph_is_stored_once(family: str) -> None:
    bundle = exported(family)

    graph = onnx.load(bundle / GRAPH_FILE).graph

    kinds = [node.op_type for node in graph.node]
    layers = json.loads((bundle / "config.json").read_text())["num_hidden_layers"]
    assert kinds.count("MultiHeadAttention") == layers
    assert kinds.count("RotaryEmbedding") == (2 * layers if family == "modernbert" else 0)
    assert "Softmax" not in kinds
    assert not {"MatMulInteger", "Gemm"} & set(kinds)
    assert [path.name for path in bundle.rglob("*.onnx*")] == ["model_quantized.onnx"]
    assert str(Path(torch.__file__).parent).encode() not in (bundle / GRAPH_FILE).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_index_names_every_weight_inside_the_graphs_own_file(family: str) -> None:
    from safetensors.numpy import load_file

    trained = load_file(source(family) / "model.safetensors")

    weights = WeightFile(exported(family))

    assert set(weights) == set(trained)
    for name, value in trained.items():
        found = weights.dequantize(name)
        if weights.kind(name) == "dense":
            np.testing.assert_array_equal(found, value)
        else:
            step = np.abs(value).max(axis=1, keepdims=True) / 63
            assert (np.abs(found - value) <= step * 0.51).all(), name


def test_layers_products_fit_16_bits_on_processors_without_integer_dot_products() -> None:
    graph = onnx.load(exported("modernbert") / GRAPH_FILE).graph
    codes = {t.name: t for t in graph.initializer if t.name.endswith(".codes")}

    products = [node.input[1] for node in graph.node if node.op_type == "DynamicQuantizeMatMul"]

    assert len(products) >= 10
    for name in products:
        assert np.abs(numpy_helper.to_array(codes[name]).astype(int)).max() <= 63


def test_golden_answers_are_torchs(tmp_path: Path) -> None:
    bundle = exported("modernbert")
    golden = decode_golden((bundle / "golden.json").read_bytes())
    model = load_slm(bundle, dtype=torch.float32)

    for row in golden.rows:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0].numpy()
        error = np.linalg.norm(logits[list(row.columns)] - row.logits)
        assert error / np.linalg.norm(logits - logits.mean()) < 0.05


def test_layers_that_lose_too_much_are_multiplied_in_32_bits(tmp_path: Path) -> None:
    hf = save_bert(tmp_path / "hf")
    _give_an_outlier(hf)

    manifest = export_encoder(
        hf, tmp_path / "out", family="e", release="r", text_for_parity=TEXTS, limits=_limits(0.5)
    )

    assert 0 < manifest.parity["exact_layers"] <= 0.5 * len(manifest.adapter_slots)
    assert manifest.parity["logit_error"] <= 0.02
    graph = onnx.load(tmp_path / "out" / GRAPH_FILE).graph
    dense = [node for node in graph.node if node.name.endswith("/cast")]
    assert len(dense) == manifest.parity["exact_layers"]
    assert WeightFile(tmp_path / "out").kind(dense[0].input[0].replace("codes", "weight")) == "int8"


def test_too_large_an_error_stops_the_export_and_names_the_worst_layer(tmp_path: Path) -> None:
    hf = save_bert(tmp_path / "hf")
    _give_an_outlier(hf)

    with pytest.raises(
        ExportError,
        match=r"logit_error 0\.\d+.*the worst layer is bert\.encoder\.layer\.1\.output\.dense \(",
    ):
        export_encoder(
            hf, tmp_path / "out", family="e", release="r", text_for_parity=TEXTS, limits=_limits(0)
        )

    assert not (tmp_path / "out").exists()


def test_accuracy_on_examples_is_compared_with_16_bits(tmp_path: Path) -> None:
    hf = save_modernbert(tmp_path / "hf", num_hidden_layers=1)
    examples = [(text, "open") for text in TEXTS]

    manifest = export_encoder(hf, tmp_path / "out", family="e", release="r", examples=examples)

    assert manifest.parity["examples"] == len(TEXTS)
    assert manifest.parity["accuracy"] >= manifest.parity["accuracy_16_bit"] - 0.01
    with pytest.raises(ExportError, match="label 'shut' is not one of the model's: open, list"):
        export_encoder(
            hf, tmp_path / "other", family="e", release="r", examples=[("a door", "shut")]
        )


def test_a_lost_point_of_accuracy_stops_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.encoder import _metric

    wanted, wrong = np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]], np.float32)
    monkeypatch.setattr(encoder_parity, "graph_answers", lambda folder, feeds: wrong)

    with pytest.raises(ExportError, match=r"from 100\.0% in 16 bits to 50\.0% on 2 examples"):
        _metric(Path(), [{}, {}], wanted, 1.0, EncoderLimits())


def test_a_plain_encoder_embeds_and_has_no_logits(tmp_path: Path) -> None:
    hf = save_bert(tmp_path / "hf", kind="ForMaskedLM", num_hidden_layers=1)

    manifest = export_encoder(hf, tmp_path / "out", family="e", release="r", text_for_parity=TEXTS)

    assert manifest.architecture == "BertModel"
    assert manifest.parity["embedding_error"] <= 0.02
    outputs = [value.name for value in onnx.load(tmp_path / "out" / GRAPH_FILE).graph.output]
    assert outputs == ["last_hidden_state", "sentence_embedding"]


def test_a_decoder_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"LlamaForCausalLM, which is no encoder"):
        export_encoder(save_tiny(tmp_path / "hf"), tmp_path / "out", family="e", release="r1")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a model folder"):
        export_encoder(tmp_path / "absent", tmp_path / "out", family="e", release="r1")


def test_the_command_exports_a_classifier_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, text = save_bert(tmp_path / "hf", num_hidden_layers=1), tmp_path / "texts.txt"
    text.write_text("\n".join(TEXTS), encoding="utf-8")
    names = ["--family", "f", "--release", "r", "--json", "--text", str(text)]

    code = cli.main(["export", str(hf), str(tmp_path / "out"), *names])

    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert code == 0
    assert found["kind"] == "encoder"
    assert (tmp_path / "out" / "onnx" / "model_quantized.onnx").is_file()


def _give_an_outlier(hf: Path) -> None:
    """One value of 200 that nothing reads: 8 bits that reach so far leave little for the rest."""
    from safetensors.torch import load_file, save_file

    weights = load_file(hf / "model.safetensors")
    layer = "bert.encoder.layer.1"
    weights[f"{layer}.intermediate.dense.bias"][7] = 200.0
    weights[f"{layer}.output.dense.weight"][:, 7] = 0.0
    save_file(weights, hf / "model.safetensors", {"format": "pt"})


def _limits(share: float) -> EncoderLimits:
    return EncoderLimits(exact_share=share)
