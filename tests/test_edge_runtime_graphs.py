"""edge: a session answers with the quickest graph that does what was asked."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_sdk.adapter_file import write_adapter
from edge_sdk.runtime import SlmSession
from exporters.bundle import read_manifest
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    save_tiny(folder / "hf")
    exact = SlmOptions(accuracy_level=1)
    export_slm(folder / "hf", folder / "out", family="t", release="r", options=exact)
    return folder / "out"


@pytest.fixture(scope="module")
def adapter(bundle: Path) -> Path:
    rng = np.random.default_rng(4)
    manifest, path = read_manifest(bundle), bundle.parent / "it.onnx_adapter"
    factors = {}
    for name, (out, width) in manifest.adapter_slots.items():
        factors[f"{name}.lora_A"] = rng.normal(0, 0.3, (2, width)).astype(np.float32)
        factors[f"{name}.lora_B"] = rng.normal(0, 0.3, (out, 2)).astype(np.float32)
    write_adapter(factors, rank=2, alpha=2.0, slots=manifest.adapter_slots, path=path, rank_max=64)
    return path


def _only(bundle: Path, folder: Path, *graphs: str) -> Path:
    """A copy of the bundle in which every other graph is damaged."""
    copy = Path(shutil.copytree(bundle, folder / "copy"))
    for path in copy.glob("*.onnx"):
        if path.name not in graphs:
            path.write_bytes(b"\x08")
    return copy


def _every_row(session: SlmSession, ids: list[int]) -> np.ndarray:  # (T, vocab)
    generator = session.generator(session.request({}), limit=len(ids) + 1, every_row=True)
    generator.append_tokens(np.array([ids], np.int32))
    return np.array(generator.get_output("logits"))[0]


def test_a_plain_answer_needs_the_quickest_graph_only(bundle: Path, tmp_path: Path) -> None:
    with SlmSession(bundle) as session:
        _every_row(session, [1, 2])  # from now on with model.onnx
        expected = session.generate("the harbour", max_tokens=8)

    with SlmSession(_only(bundle, tmp_path, "answer.onnx"), check=False) as session:
        assert session.generate("the harbour", max_tokens=8) == expected


def test_an_adapter_needs_the_adapted_graph_only(
    bundle: Path, adapter: Path, tmp_path: Path
) -> None:
    with SlmSession(bundle) as session:
        plain = session.next_logits([5, 6, 7])
        session.set_adapter(adapter)
        _every_row(session, [1, 2])
        expected = session.next_logits([5, 6, 7])

    graphs = ("answer.onnx", "answer_adapted.onnx")
    with SlmSession(_only(bundle, tmp_path, *graphs), check=False) as session:
        session.set_adapter(adapter)
        moved = session.next_logits([5, 6, 7])
        session.set_adapter(None)
        back = session.next_logits([5, 6, 7])

    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(back, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(moved - plain).max() > 0.1


def test_every_rows_logits_come_where_they_are_asked_for(bundle: Path) -> None:
    ids = list(range(1, 20))
    with SlmSession(bundle) as session:
        whole = _every_row(session, ids)
        last = session.next_logits(ids)

    assert whole.shape == (19, 320)
    np.testing.assert_allclose(whole[-1], last, rtol=1e-5, atol=1e-5)


def test_an_answer_begun_with_an_adapter_keeps_it_when_the_graph_changes(
    bundle: Path, adapter: Path
) -> None:
    with SlmSession(bundle) as session:
        session.load_adapter("a", adapter)
        expected = session.generate("the harbour", max_tokens=30, adapter="a")

    with SlmSession(bundle) as session:
        session.load_adapter("a", adapter)
        answer = session.stream("the harbour", max_tokens=30, adapter="a")
        begun = next(answer)
        _every_row(session, [1, 2, 3])
        assert begun + "".join(answer) == expected
        assert session.adapters == ("a",)
        assert session.generate("the harbour", max_tokens=30, adapter="a") == expected


def test_a_bundle_from_before_has_one_graph_and_works(
    bundle: Path, adapter: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    for name in ("answer.onnx", "answer_adapted.onnx"):
        (copy / name).unlink()

    with SlmSession(bundle) as new, SlmSession(copy, check=False) as old:
        for session in (new, old):
            session.load_adapter("a", adapter)
        for name in ("", "a"):
            answers = [s.generate("the harbour", max_tokens=9, adapter=name) for s in (new, old)]
            assert answers[0] == answers[1]


def test_the_quickest_graph_takes_no_adapter(bundle: Path) -> None:
    graph = onnx.load(str(bundle / "answer.onnx"), load_external_data=False).graph

    assert not [value.name for value in graph.input if ".lora_" in value.name]
