"""exporters: a classifier becomes two graphs that name torch's classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_sdk import cli
from edge_sdk.errors import ExportError
from exporters.bundle import check_release
from exporters.encoder import INT8_FILE, export_encoder
from tests.exporters_tiny import save_tiny, save_tiny_tokenizer

TEXTS = ["a boat", "the harbour was quiet", "Which river flows north?", "x", "one two three four"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        num_labels=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("encoder") / "hf"
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def test_both_graphs_agree_with_torch_at_other_lengths(source: Path, tmp_path: Path) -> None:
    import onnxruntime as ort
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    manifest = export_encoder(source, out, family="e", release="r1", text_for_parity=TEXTS)

    assert manifest.parity["logit_error"] < 1e-4
    assert manifest.parity["int8_agreement"] == 1.0
    assert check_release(out, family="e", release="r1") == manifest
    assert (out / INT8_FILE).stat().st_size < 0.5 * (out / "onnx/model.onnx").stat().st_size
    assert str(Path(torch.__file__).parent).encode() not in (out / INT8_FILE).read_bytes()
    session = ort.InferenceSession(str(out / INT8_FILE))
    ids = AutoTokenizer.from_pretrained(out)("one more text", return_tensors="np")
    names = {value.name for value in session.get_inputs()}
    logits = session.run(None, {k: v.astype(np.int64) for k, v in ids.items() if k in names})[0]
    assert logits.shape == (1, 4)


def test_a_decoder_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"LlamaForCausalLM, which is no text classifier"):
        export_encoder(save_tiny(tmp_path / "hf"), tmp_path / "out", family="e", release="r1")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a model folder"):
        export_encoder(tmp_path / "absent", tmp_path / "out", family="e", release="r1")


def test_the_command_exports_a_classifier_too(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(
        ["export", str(source), str(tmp_path / "out"), "--family", "f", "--release", "r", "--json"]
    )

    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert code == 0
    assert found["kind"] == "encoder"
    assert (tmp_path / "out" / "onnx" / "model_quantized.onnx").is_file()
