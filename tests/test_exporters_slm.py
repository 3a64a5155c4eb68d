"""exporters: a decoder becomes a bundle whose graph, weights index and claims agree with torch."""

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from compression.int4 import WeightFile
from compression.int4_torch import load_slm
from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import ReleaseManifest
from exporters.bundle import check_release, read_manifest
from exporters.lora_inputs import add_lora_inputs, slot_names
from exporters.parity import ParityLimits, check_parity, empty_cache_feed, open_session
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny

EXACT = SlmOptions(accuracy_level=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slm")
    save_tiny(folder / "hf")
    export_slm(folder / "hf", folder / "out", family="tiny", release="r1", options=EXACT)
    return folder / "out"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def _logits(folder: Path, extra: dict[str, np.ndarray] | None = None) -> np.ndarray:
    session = open_session(folder)
    ids = np.arange(1, 40, dtype=np.int64)[None]
    feed = empty_cache_feed(folder, session, ids) | (extra or {})
    return session.run(["logits"], feed)[0][0]


def test_torch_with_the_bundles_weights_gives_the_graphs_logits(bundle: Path) -> None:
    ids = torch.arange(1, 40)[None]

    with torch.inference_mode():
        expected = load_slm(bundle, dtype=torch.float32)(ids).logits[0].numpy()

    np.testing.assert_allclose(_logits(bundle), expected, atol=1e-3, rtol=1e-3)


def test_every_linear_of_every_layer_has_a_slot(bundle: Path) -> None:
    slots = read_manifest(bundle).adapter_slots

    kinds = {name.rsplit(".", 1)[-1] for name in slots}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(slots) == 2 * len(kinds)
    assert slots["model.layers.1.self_attn.k_proj"] == (32, 64)


def test_empty_slots_give_the_plain_graph_to_the_last_bit(copy: Path) -> None:
    with_slots = _logits(copy)
    graph = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    kept = [node for node in graph.graph.node if "/lora_" not in node.name]
    for node in kept:
        if node.op_type == "MatMulNBits":
            node.output[0] = node.output[0].removesuffix("/plain")
    del graph.graph.node[:]
    graph.graph.node.extend(kept)
    for values in (graph.graph.input, graph.graph.initializer):
        plain = [value for value in values if ".lora_" not in value.name]
        del values[:]
        values.extend(plain)
    onnx.save(graph, str(copy / "model.onnx"))

    assert np.array_equal(with_slots, _logits(copy))


@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_filled_slots_equal_torch_with_the_product_added(bundle: Path, name: str) -> None:
    rng = np.random.default_rng(3)
    name = f"model.layers.0.{name}"
    out, width = read_manifest(bundle).adapter_slots[name]
    A = rng.normal(0, 0.2, (width, 4)).astype(np.float32)
    B = rng.normal(0, 0.2, (4, out)).astype(np.float32)
    model = load_slm(bundle, dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule(name).weight += torch.from_numpy((A @ B).T)
        expected = model(torch.arange(1, 40)[None]).logits[0].numpy()

    found = _logits(bundle, dict(zip(slot_names(name), (A, B), strict=True)))

    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-3)
    assert np.abs(found - _logits(bundle)).max() > 0.1


def test_a_slot_for_a_node_that_is_not_there_is_an_error() -> None:
    from exporters.lora_inputs import Linear

    with pytest.raises(ExportError, match=r"no node for model\.x"):
        add_lora_inputs(onnx.ModelProto(), {"/x": (Linear("model.x", 1, 1),)})


def test_the_folder_loads_in_transformers_and_genai(bundle: Path) -> None:
    import onnxruntime_genai as og
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(bundle).architectures == ["LlamaForCausalLM"]
    ids = AutoTokenizer.from_pretrained(bundle)("the harbour")["input_ids"]
    model = og.Model(str(bundle))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 4)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    logits = generator.get_logits()

    assert list(og.Tokenizer(model).encode("the harbour")) == ids
    assert np.isfinite(logits).all()


def test_the_bundle_says_how_many_threads_and_holds_one_data_file(bundle: Path) -> None:
    genai = json.loads((bundle / "genai_config.json").read_text())

    assert genai["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 2
    assert [path.name for path in bundle.glob("*.data")] == ["model.onnx.data"]


def test_the_tied_table_is_stored_once_in_eight_bits(bundle: Path) -> None:
    weights = WeightFile(bundle)

    assert weights.source("lm_head.weight") == "model.embed_tokens.weight"
    assert weights.packed("model.embed_tokens.weight").bits == 8
    assert weights.packed("model.layers.0.self_attn.q_proj.weight").bits == 4


def test_the_manifest_is_returned_and_names_the_files(bundle: Path) -> None:
    manifest = check_release(bundle, family="tiny", release="r1")

    assert isinstance(manifest, ReleaseManifest)
    assert manifest.context == 128
    assert manifest.parity["greedy_agreement"] == 1.0
    assert {"model.onnx", "model.onnx.data", "weights.json"} <= manifest.files.keys()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Qwen3", {}),
        ("Qwen2", {"tie_word_embeddings": False}),
        ("Gemma", {}),
        ("Gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 32}),
        ("Mistral", {}),
        ("SmolLM3", {}),
        ("Phi", {"num_key_value_heads": 2}),
    ],
)
def test_other_families_agree_with_torch(
    family: str, changes: dict[str, object], tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "hf", family, **changes)

    manifest = export_slm(source, tmp_path / "out", family="f", release="r", options=EXACT)

    assert manifest.parity["logit_error"] < 1e-3


def test_a_changed_weight_stops_the_export_and_names_its_layer(copy: Path) -> None:
    entry = json.loads((copy / "weights.json").read_text())["tensors"]
    offset, size = entry["model.layers.1.self_attn.o_proj.weight"]["packed"]
    index = json.loads((copy / "weights.json").read_text())
    data = bytearray((copy / "model.onnx.data").read_bytes())
    spare = len(data)
    data += bytes(255 - byte for byte in data[offset : offset + size])
    (copy / "model.onnx.data").write_bytes(bytes(data))
    index["tensors"]["model.layers.1.self_attn.o_proj.weight"]["packed"] = [spare, size]
    (copy / "weights.json").write_text(json.dumps(index))

    with pytest.raises(ExportError, match=r"worst layer is model\.layers\.1\.self_attn\.o_proj"):
        check_parity(copy)


def test_limits_can_be_tightened(bundle: Path) -> None:
    with pytest.raises(ExportError, match="logit error"):
        check_parity(bundle, limits=ParityLimits(logit_error=0.0))


def test_text_without_tokens_cannot_be_compared(bundle: Path) -> None:
    with pytest.raises(ExportError, match="no tokens"):
        check_parity(bundle, [""])


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no config\.json"):
        export_slm(tmp_path / "nothing", tmp_path / "out", family="f", release="r")

    assert not (tmp_path / "out").exists()


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"]}')

    with pytest.raises(ExportError, match=r"T5ForConditionalGeneration.*LlamaForCausalLM"):
        export_slm(tmp_path, tmp_path / "out", family="f", release="r")


def test_a_folder_in_use_is_not_overwritten(bundle: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf")

    with pytest.raises(ExportError, match="not an empty folder"):
        export_slm(tmp_path / "hf", bundle, family="f", release="r")


def test_exporting_leaves_the_callers_logging_and_path_alone(bundle: Path) -> None:
    assert logging.root.manager.disable == logging.NOTSET
    assert not any("onnxruntime_genai" in entry for entry in sys.path)
