"""exporters: the graphs for answering are model.onnx's last row, with and without adapters."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_sdk.errors import ExportError
from edge_sdk.graphs import check_bundle
from exporters.bundle import read_manifest
from exporters.last_row import keep_last_row
from exporters.lora_inputs import places, slot_names
from exporters.parity import check_parity, empty_cache_feed, open_session
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny

QUICK = ("answer.onnx", "answer_adapted.onnx")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answer")
    save_tiny(folder / "hf")
    export_slm(
        folder / "hf", folder / "out", family="t", release="r", options=SlmOptions(accuracy_level=1)
    )
    return folder / "out"


def _logits(
    bundle: Path, file: str, ids: np.ndarray, **extra: np.ndarray
) -> np.ndarray:  # (B, rows, vocab)
    session = open_session(bundle, file=file)
    return session.run(["logits"], empty_cache_feed(bundle, session, ids) | extra)[0]


@pytest.mark.parametrize("file", QUICK)
def test_each_padded_text_is_answered_after_its_own_last_token(bundle: Path, file: str) -> None:
    ids = np.arange(1, 28, dtype=np.int64).reshape(3, 9)
    lengths = np.array([9, 4, 1])
    mask = (np.arange(9) < lengths[:, None]).astype(np.int64)  # padded on the right

    whole = _logits(bundle, "model.onnx", ids, attention_mask=mask)
    last = _logits(bundle, file, ids, attention_mask=mask)

    assert last.shape == (3, 1, 320)
    expected = whole[np.arange(3), lengths - 1]
    np.testing.assert_allclose(last[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", QUICK)
@pytest.mark.parametrize("more", [1, 3])
def test_tokens_appended_to_what_was_read_are_answered_after_the_last(
    bundle: Path, file: str, more: int
) -> None:
    ids = np.arange(1, 12, dtype=np.int64)[None]
    whole = _logits(bundle, "model.onnx", ids)
    session = open_session(bundle, file=file)
    feed = empty_cache_feed(bundle, session, ids[:, :-more])
    names = [value.name for value in session.get_outputs()]
    read = dict(zip(names, session.run(names, feed), strict=True))
    past = {
        name: read[name.replace("past_key_values", "present")]
        for name in feed
        if name.startswith("past_key_values")
    }

    mask = np.ones_like(ids)
    last = session.run(["logits"], {"input_ids": ids[:, -more:], "attention_mask": mask, **past})[0]

    np.testing.assert_allclose(last[0, 0], whole[0, -1], rtol=1e-5, atol=1e-5)


def test_an_adapter_moves_the_adapted_graph_as_it_moves_the_whole_one(bundle: Path) -> None:
    rng = np.random.default_rng(5)
    ids = np.arange(1, 20, dtype=np.int64)[None]
    factors = {}
    for name, (out, width) in read_manifest(bundle).adapter_slots.items():
        a, b = slot_names(name)
        factors[a] = rng.normal(0, 0.1, (width, 2)).astype(np.float32)
        factors[b] = rng.normal(0, 0.1, (2, out)).astype(np.float32)

    whole = _logits(bundle, "model.onnx", ids, **factors)[0, -1]
    last = _logits(bundle, "answer_adapted.onnx", ids, **factors)[0, 0]

    np.testing.assert_allclose(last, whole, rtol=1e-4, atol=1e-4)
    assert np.abs(whole - _logits(bundle, "model.onnx", ids)[0, -1]).max() > 0.1


def test_the_quickest_graph_has_no_slots_and_all_share_one_data_file(bundle: Path) -> None:
    inputs, files = {}, set()
    for file in ("model.onnx", *QUICK):
        graph = onnx.load(str(bundle / file), load_external_data=False).graph
        inputs[file] = {value.name for value in graph.input if ".lora_" in value.name}
        files |= {entry.value for t in graph.initializer for entry in t.external_data[:1]}

    assert inputs["answer.onnx"] == set()
    assert inputs["answer_adapted.onnx"] == inputs["model.onnx"] != set()
    assert files == {"model.onnx.data"}
    assert sum((bundle / file).stat().st_size for file in QUICK) < 200_000


def test_every_projection_has_its_own_columns_of_the_joined_product(bundle: Path) -> None:
    found = places(onnx.load(str(bundle / "model.onnx"), load_external_data=False))

    q, k, v = (found[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    assert (q.y, k.y) == (v.y, v.y)
    assert [(at.start, at.stop) for at in (q, k, v)] == [(0, 64), (64, 96), (96, 128)]
    assert set(found) == set(read_manifest(bundle).adapter_slots)


def test_a_device_may_load_all_three(bundle: Path) -> None:
    check_bundle(bundle)


def test_genai_answers_alike_with_each_graph(bundle: Path) -> None:
    import onnxruntime_genai as og

    answers = []
    for file in ("model.onnx", *QUICK):
        config = og.Config(str(bundle))
        config.overlay(json.dumps({"model": {"decoder": {"filename": file}}}))
        model = og.Model(config)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=30, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.arange(1, 20, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        answers.append(list(generator.get_sequence(0)))

    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) > 20


def test_a_quick_graph_with_other_logits_stops_the_export(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    graph = onnx.load(str(copy / "answer.onnx"), load_external_data=False)
    rows = next(node for node in graph.graph.node if node.name == "/last_row/min")
    rows.input[1] = "/last_row/one"  # always the first token
    onnx.save(graph, str(copy / "answer.onnx"))

    with pytest.raises(ExportError, match=r"answer\.onnx gives other logits"):
        check_parity(copy)


def test_a_missing_quick_graph_is_named(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "answer.onnx").unlink()

    with pytest.raises(ExportError, match=r"answer\.onnx cannot be loaded"):
        check_parity(copy)


def test_a_graph_without_grouped_attention_is_refused() -> None:
    with pytest.raises(ExportError, match="no grouped attention"):
        keep_last_row(onnx.ModelProto())
