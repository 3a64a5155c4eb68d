"""exporters: a bundle folder, as it is, is what other programs' loaders expect."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.encoders import EncoderSession
from exporters.encoder import GRAPH_FILE
from exporters.slm import SlmOptions, export_slm
from tests.encoders_tiny import LABELS, TEXTS, exported
from tests.exporters_tiny import save_tiny

NODE_FOLDER = "SYMBIONT_TRANSFORMERS_JS"
"""Names a folder where `npm install --ignore-scripts @huggingface/transformers` was done."""
CHECK = Path(__file__).parent / "transformers_js" / "check.mjs"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    exact = SlmOptions(accuracy_level=1)
    export_slm(save_tiny(folder / "hf"), folder / "r1", family="tiny", release="r1", options=exact)
    return folder / "r1"


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_transformers_reads_an_encoders_tokenizer_and_configuration(family: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    bundle = exported(family)
    tokenizer = AutoTokenizer.from_pretrained(bundle, local_files_only=True)
    config = AutoConfig.from_pretrained(bundle, local_files_only=True)

    with EncoderSession(bundle) as session:
        for text in TEXTS:
            cut = tokenizer(text, truncation=True, max_length=session.context)
            assert cut["input_ids"] == session.encode(text)
        assert tuple(config.id2label.values()) == session.labels
    assert config.architectures[0].endswith("ForSequenceClassification")


def test_transformers_reads_a_decoders_tokenizer_and_configuration(decoder: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(decoder, local_files_only=True)
    config = AutoConfig.from_pretrained(decoder, local_files_only=True)

    own = Tokenizer.from_file(str(decoder / "tokenizer.json"))
    assert tokenizer("a boat")["input_ids"] == own.encode("a boat").ids
    assert config.architectures == ["LlamaForCausalLM"]


def test_onnxruntime_genai_runs_a_decoder_bundle(decoder: Path) -> None:
    import onnxruntime_genai as og

    model = og.Model(str(decoder))
    tokenizer = og.Tokenizer(model)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=12, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(tokenizer.encode("a boat"))
    while not generator.is_done():
        generator.generate_next_token()

    assert 6 < len(generator.get_sequence(0)) <= 12


def test_a_bare_onnxruntime_session_needs_only_ids_and_mask() -> None:
    import onnxruntime as ort
    from transformers import AutoTokenizer

    bundle = exported("modernbert")
    session = ort.InferenceSession(str(bundle / GRAPH_FILE))
    given = AutoTokenizer.from_pretrained(bundle)(TEXTS[1], return_tensors="np")
    names = [value.name for value in session.get_inputs()]

    assert names == ["input_ids", "attention_mask"]  # LoRA inputs have defaults
    logits, embedding = session.run(None, {k: given[k].astype(np.int64) for k in names})
    assert logits.shape == (1, len(LABELS))
    assert embedding.shape == (1, 64)


def test_an_encoder_bundle_has_the_names_of_transformers_js() -> None:
    bundle = exported("modernbert")

    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}

    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", GRAPH_FILE}
    assert wanted <= names
    assert GRAPH_FILE == "onnx/model_quantized.onnx"  # what dtype "q8" asks for
    config = json.loads((bundle / "config.json").read_text())
    assert config["model_type"] == "modernbert"
    named = json.loads((bundle / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named != "TokenizersBackend"  # unknown before transformers 5


def test_transformers_js_answers_as_the_session_does(tmp_path: Path) -> None:
    folder = os.environ.get(NODE_FOLDER, "")
    if not folder:
        pytest.skip(f"set {NODE_FOLDER} to a folder with node's @huggingface/transformers")
    shutil.copytree(exported("modernbert"), tmp_path / "tiny")
    command = ["node", str(CHECK), str(tmp_path), "tiny", *TEXTS]

    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    with EncoderSession(exported("modernbert")) as session:
        for text, row in zip(TEXTS, rows, strict=True):
            np.testing.assert_allclose(
                row["logits"], session.next_logits(session.encode(text)), atol=0.02
            )
            np.testing.assert_allclose(row["embedding"], session.embed([text])[0], atol=0.01)
