"""exporters and runtime: a graph of its own reads prompts, with 8-bit forms of the same weights."""

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_sdk.adapter_file import write_adapter
from edge_sdk.errors import RuntimeFailure
from edge_sdk.graphs import check_bundle
from edge_sdk.runtime import SlmSession
from edge_sdk.wire.manifest import PROMPT_FILE
from exporters import prompt_graph
from exporters.bundle import read_manifest
from exporters.parity import ANSWER_FILE, ParityLimits, empty_cache_feed, open_session
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny

IDS = np.random.default_rng(3).integers(1, 250, (1, 40))
PROMPTS = ["the harbour was quiet", "Request: hello\nKind:", "aaaaaaaa"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with such a graph, whose layers have blocks of 32 weights."""
    folder = tmp_path_factory.mktemp("prompt")
    save_tiny(folder / "hf")
    noise = ParityLimits(logit_error=0.2, greedy_agreement=0.8)  # what its weights are
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_graph, "LEAST_BYTES", 1)
        export_slm(
            folder / "hf",
            folder / "out",
            family="t",
            release="r",
            options=SlmOptions(block=32, threads=1),
            limits=noise,
        )
    return folder / "out"


@pytest.fixture
def sessions(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[SlmSession, SlmSession]]:
    """Two over the bundle: with the graph for prompts, and without."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with SlmSession(bundle, max_tokens=30) as quick:
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        with SlmSession(bundle, max_tokens=30) as plain:
            yield quick, plain


def _logits(bundle: Path, file: str, ids: np.ndarray) -> np.ndarray:
    session = open_session(bundle, file=file)
    found: np.ndarray = session.run(["logits"], empty_cache_feed(bundle, session, ids))[0]
    return found


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_it_answers_as_the_graph_it_stands_in_for(bundle: Path) -> None:
    expected = _logits(bundle, ANSWER_FILE, IDS)

    assert _error(_logits(bundle, PROMPT_FILE, IDS), expected) < 1e-4
    assert _error(_logits(bundle, PROMPT_FILE, IDS[:, ::-1]), expected) > 0.5


def test_it_takes_no_disk_but_its_graph_and_devices_let_it_in(bundle: Path) -> None:
    check_bundle(bundle)
    graph = onnx.load(str(bundle / PROMPT_FILE), load_external_data=False).graph
    outside = [e for t in graph.initializer for e in t.external_data if e.key == "location"]
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]

    assert {entry.value for entry in outside} == {"model.onnx.data"}
    assert {a.i for node in products for a in node.attribute if a.name == "bits"} == {8}
    assert PROMPT_FILE in read_manifest(bundle).files


@pytest.mark.parametrize("bounds", [(10**9, 2 * 10**9), (1, 1000)], ids=["small", "large"])
def test_models_that_would_not_gain_have_none(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int]
) -> None:
    least, most = bounds
    monkeypatch.setattr(prompt_graph, "LEAST_BYTES", least)
    monkeypatch.setattr(prompt_graph, "MOST_BYTES", most)
    graph = onnx.load(str(bundle / ANSWER_FILE), load_external_data=False)

    prompt_graph.write_prompt_graph(graph, tmp_path)

    assert not list(tmp_path.iterdir())


def test_products_with_32_bit_activations_keep_4_bits(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_graph, "LEAST_BYTES", 1)
    graph = onnx.load(str(bundle / ANSWER_FILE), load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1

    prompt_graph.write_prompt_graph(graph, tmp_path)

    assert not list(tmp_path.iterdir())


Sessions = tuple[SlmSession, SlmSession]


def test_a_session_opens_it_where_it_is_quicker_and_memory_is_not_short(
    bundle: Path, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "the harbour was quiet when the first boat came in"
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    with SlmSession(bundle, memory_mb=4000.0) as tight, SlmSession(bundle) as windows:
        everyone = [*sessions, tight, windows]
        for session in everyone:
            session.generate("hello", max_tokens=20)
        at_first = [session._model._reader is not None for session in everyone]
        for session in everyone:
            session.generate(long, max_tokens=3)
        later = [session._model._reader is not None for session in everyone]

    assert at_first == [False] * 4
    assert later == [True, False, False, True]


def test_answers_are_those_of_a_session_without_it(sessions: Sessions) -> None:
    def answers(session: SlmSession) -> list[object]:
        few = {"max_tokens": 6}
        together = session.generate_many(PROMPTS, **few)
        chosen = session.generate(PROMPTS[0], temperature=0.9, top_p=0.8, seed=11, **few)
        shaped = session.generate(PROMPTS[1], schema={"enum": ["yes", "no"]}, max_tokens=8)
        alone = [session.generate(prompt, **few) for prompt in PROMPTS]
        return [alone, together, chosen, shaped]

    quick, plain = map(answers, sessions)

    assert sessions[0]._model._reader is not None
    assert quick == plain
    assert quick[0] == quick[1]
    assert quick[3] in ('"yes"', '"no"')


def test_an_adapter_is_never_left_out(bundle: Path, sessions: Sessions, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    manifest = read_manifest(bundle)
    factors = {}
    for name, (out, width) in manifest.adapter_slots.items():
        factors[f"{name}.lora_A"] = rng.normal(0, 0.1, (2, width)).astype(np.float32)
        factors[f"{name}.lora_B"] = rng.normal(0, 0.1, (out, 2)).astype(np.float32)
    path = tmp_path / "a.onnx_adapter"
    write_adapter(factors, rank=2, alpha=4, slots=manifest.adapter_slots, path=path)
    ids = [int(token) for token in IDS[0]]
    before = sessions[0].next_logits(ids)
    for session in sessions:
        session.set_adapter(path)

    quick, plain = (session.next_logits(ids) for session in sessions)

    assert _error(quick, plain) < 1e-4
    assert _error(quick, before) > 0.1
    assert sessions[0]._model._reader is None  # its memory is free again


def test_a_damaged_file_is_named_and_the_session_goes_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / PROMPT_FILE).write_bytes(b"")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    with SlmSession(copy, check=False) as session:
        with pytest.raises(RuntimeFailure, match=r"prompt\.onnx"):
            session.next_logits([5, 6, 7])
        assert session.generate("hello", max_tokens=20)
