"""A speculative bundle: the same answers, genai's own modes switched on by an overlay."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest

from edge_sdk.errors import ExportError
from edge_sdk.graphs import check_bundle
from edge_sdk.runtime import SlmSession
from edge_sdk.speculation import Speculator
from exporters.bundle import check_release
from exporters.draft import DRAFT_SETTINGS, NGRAM_SETTINGS, VERIFY_FILE, add_draft
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny

PROMPTS = ["Request: hello\nKind:", "aaaaaaaa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    exact = SlmOptions(accuracy_level=1, threads=1)
    for name, size in (("target", 96), ("draft", 64)):
        save_tiny(folder / f"hf-{name}", intermediate_size=size)
        export_slm(folder / f"hf-{name}", folder / name, family="tiny", release="r", options=exact)
    add_draft(folder / "target", folder / "draft", folder / "pair", release="r-spec")
    return folder


@pytest.mark.parametrize("settings", [DRAFT_SETTINGS, NGRAM_SETTINGS])
def test_genais_own_mode_writes_what_the_session_writes(folder, settings) -> None:
    config = og.Config(str(folder / "pair"))
    config.overlay((folder / "pair" / settings).read_text())
    model = og.Model(config)
    with SlmSession(folder / "target", max_tokens=30) as session:
        for prompt in PROMPTS:
            ids = session.encode(prompt)
            params = og.GeneratorParams(model)
            params.set_search_options(do_sample=False, max_length=len(ids) + 30, batch_size=1)
            generator = og.Generator(model, params)
            generator.append_tokens(np.array([ids], np.int32))
            tokens = []
            while not generator.is_done():
                generator.generate_next_token()
                tokens.append(int(generator.get_next_tokens()[0]))

            answer = session.stream(prompt)
            for _ in answer:
                pass
            assert [t for t in tokens if t != 0] == answer.tokens
            assert generator.get_speculative_stats()["rounds"] > 0


def test_the_verifying_graph_is_the_targets_without_slots(folder) -> None:
    with SlmSession(folder / "pair", max_tokens=30) as session:
        speculator = Speculator(session)
        for prompt in PROMPTS:
            assert speculator.generate(prompt) == session.generate(prompt)
    graph = (folder / "pair" / VERIFY_FILE).read_bytes()
    assert b"lora" not in graph
    assert b"lora_A" in (folder / "pair" / "model.onnx").read_bytes()


def test_it_is_a_release_and_the_bundle_of_before_with_three_kinds_of_files_more(folder) -> None:
    manifest = check_release(folder / "pair", family="tiny", release="r-spec")
    check_bundle(folder / "pair")  # as a device judges it

    before = {path.name for path in (folder / "target").iterdir()}
    more = set(manifest.files) - before
    assert more == {VERIFY_FILE, DRAFT_SETTINGS, NGRAM_SETTINGS, "draft.onnx", "draft.onnx.data"}
    assert json.loads((folder / "pair" / "genai_config.json").read_text()) == json.loads(
        (folder / "target" / "genai_config.json").read_text()
    )


def test_without_a_draft_model_only_the_lookup_is_added(folder, tmp_path) -> None:
    manifest = add_draft(folder / "target", None, tmp_path / "out")

    assert manifest.release == "r"
    assert NGRAM_SETTINGS in manifest.files
    assert "draft.onnx" not in manifest.files


def test_what_is_no_pair_is_refused(folder, tmp_path) -> None:
    other = shutil.copytree(folder / "draft", tmp_path / "other")
    manifest = json.loads((other / "symbiont.json").read_text())
    for name, value, reason in (
        ("tokenizer_sha256", "0" * 64, "another tokenizer"),
        ("context", 8, "context is 8 tokens"),
    ):
        (other / "symbiont.json").write_text(json.dumps({**manifest, name: value}))
        with pytest.raises(ExportError, match=reason):
            add_draft(folder / "target", other, tmp_path / "out")
    with pytest.raises(ExportError, match="exists"):
        add_draft(folder / "target", None, folder / "pair")
    with pytest.raises(ExportError, match="manifest"):
        add_draft(tmp_path, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
