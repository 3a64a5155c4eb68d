"""A device with an encoder: opened, asked, refused, and updated like one with a decoder."""

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.int4_torch import load_slm
from edge_sdk.encoders import GRAPH_FILE, EncoderSession
from edge_sdk.errors import DataError, DigestError, RuntimeFailure, TrustError
from edge_sdk.graphs import check_bundle, check_files
from edge_sdk.models import Held, ModelStore, child_probe
from edge_sdk.sessions import open_session
from edge_sdk.wire.messages import OfferModel, TextTask
from exporters.bundle import read_manifest, write_adapter_release
from exporters.publisher import Publisher
from tests.encoders_tiny import LABELS, TASK, TEXTS, bundle, exported


@pytest.fixture(scope="module")
def session() -> Iterator[EncoderSession]:
    with EncoderSession(exported("modernbert")) as opened:
        yield opened


def test_the_right_session_is_opened_by_what_the_folder_holds(tmp_path: Path) -> None:
    with open_session(exported("bert"), threads=2) as opened:
        assert isinstance(opened, EncoderSession)
        assert (opened.release, opened.context) == ("r1", 64)
        assert opened.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    with pytest.raises(RuntimeFailure, match="not a model bundle"):
        open_session(tmp_path)
    with pytest.raises(RuntimeFailure, match=r"not an encoder bundle: it has no onnx/model"):
        EncoderSession(tmp_path)


def test_probabilities_are_torchs_for_texts_of_any_length_in_one_call(
    session: EncoderSession,
) -> None:
    model = load_slm(session.folder, dtype=torch.float32)
    texts = [*TEXTS, " ".join(TEXTS)]

    found = session.label_probabilities(texts)

    assert found.shape == (len(texts), len(LABELS))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    for text, row in zip(texts, found, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([session.encode(text)])).logits[0]
        np.testing.assert_allclose(row, torch.softmax(logits, -1).numpy(), atol=0.03)


def test_labels_scores_and_a_task_of_some_labels(session: EncoderSession) -> None:
    some = TextTask("some", "{text}", "{label}", ("name", "open"), ("n", "o"))
    whole = session.label_probabilities(TEXTS)

    assert session.task == TASK
    assert session.classify(TEXTS[0]) == LABELS[int(whole[0].argmax())]
    scores = session.score(TEXTS[:2], ["list", "name"])
    np.testing.assert_allclose(scores, whole[[0, 1], [1, 2]], atol=0.03)
    part = session.label_probabilities(TEXTS, some)
    np.testing.assert_allclose(part[:, 0] / part[:, 1], whole[:, 2] / whole[:, 0], rtol=1e-3)
    with pytest.raises(DataError, match="label 'shut' is not of task kind"):
        session.score(["a"], ["shut"])
    other = TextTask("other", "{text}", "{label}", ("shut",), ("s",))
    with pytest.raises(RuntimeFailure, match="no label 'shut' of task other; it has open, list"):
        session.classify("a door", other)


def test_plain_numbered_labels_take_the_tasks_names_in_order() -> None:
    names = TextTask("four", "{text}", "{label}", ("a", "b", "c", "d"), ("a", "b", "c", "d"))
    with (
        EncoderSession(exported("bert")) as plain,
        EncoderSession(exported("bert"), task=names) as s,
    ):
        found = [s.labels.index(label) for label in plain.classify_many(TEXTS)]
        assert s.classify_many(TEXTS) == [names.labels[i] for i in found]


def test_embeddings_are_the_mean_of_tokens_at_unit_length(session: EncoderSession) -> None:
    model = load_slm(session.folder, dtype=torch.float32)

    rows = session.embed(TEXTS)

    assert (rows.shape, rows.dtype) == ((len(TEXTS), 64), np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    for text, row in zip(TEXTS, rows, strict=True):
        with torch.inference_mode():
            mean = model.model(input_ids=torch.tensor([session.encode(text)]))[0][0].mean(0)
        assert float(row @ (mean / mean.norm()).numpy()) > 0.999
    assert session.embed([]).shape[0] == 0


def test_a_text_over_the_context_is_cut_and_keeps_its_last_mark(session: EncoderSession) -> None:
    long = "boat " * 200

    ids = session.encode(long)

    assert len(ids) == session.context == 48
    assert ids[0] == 2
    assert ids[-1] == 3
    same = session.embed([long, "boat " * 300])
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)


def test_refusals_leave_the_session_usable(session: EncoderSession, tmp_path: Path) -> None:
    before = session.classify(TEXTS[0])

    for texts in ([""], ["a", "  \n"]):
        with pytest.raises(RuntimeFailure, match="text to read is empty"):
            session.label_probabilities(texts)
        with pytest.raises(RuntimeFailure, match="text to read is empty"):
            session.embed(texts)
    with pytest.raises(RuntimeFailure, match=r"49 tokens are outside 1\.\.48"):
        session.next_logits([5] * 49)
    with pytest.raises(RuntimeFailure, match="not an adapter file"):
        session.set_adapter(tmp_path / "absent")

    assert session.classify(TEXTS[0]) == before


def test_a_closed_session_says_so(tmp_path: Path) -> None:
    session = open_session(exported("bert"))
    session.close()
    session.close()

    with pytest.raises(RuntimeFailure, match="session is closed"):
        session.classify("a")


@pytest.mark.parametrize("name", [GRAPH_FILE, "tokenizer.json", "config.json"])
def test_files_altered_on_disk_are_named(name: str, tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)

    with pytest.raises(DigestError, match=f"{name} was altered since it was exported"):
        EncoderSession(folder)


def test_a_cut_graph_and_a_bad_config_are_refused_unchecked_too(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    graph = folder / GRAPH_FILE
    graph.write_bytes(graph.read_bytes()[:5000])
    with pytest.raises(RuntimeFailure, match=r"graph .* cannot be loaded"):
        EncoderSession(folder, check=False)
    (folder / "config.json").write_text("[]")
    with pytest.raises(RuntimeFailure, match=r"config\.json: it is no table"):
        EncoderSession(folder, check=False)


# --- adapters -------------------------------------------------------------------------------------


def test_an_adapter_is_torchs_update_and_comes_off_again(tmp_path: Path) -> None:
    factors = _factors(rank=3)
    path = _adapter(tmp_path / "a1", factors, rank=3)
    model = load_slm(exported("modernbert"), dtype=torch.float32)
    with torch.no_grad():
        for name in {key.rpartition(".")[0] for key in factors}:
            change = factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"] * (6.0 / 3)
            model.get_submodule(name).weight += torch.from_numpy(change)

    with EncoderSession(exported("modernbert")) as session:
        plain = session.label_probabilities(TEXTS)
        session.set_adapter(path)
        adapted = session.label_probabilities(TEXTS)
        session.load_adapter("again", path)
        session.set_adapter("again")
        assert session.adapters == ("again",)
        np.testing.assert_array_equal(session.label_probabilities(TEXTS), adapted)
        session.set_adapter(None)
        np.testing.assert_array_equal(session.label_probabilities(TEXTS), plain)

    assert np.abs(adapted - plain).max() > 0.05
    for text, row in zip(TEXTS, adapted, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([session.encode(text)])).logits[0]
        np.testing.assert_allclose(row, torch.softmax(logits, -1).numpy(), atol=0.05)


def test_an_adapter_of_another_encoder_is_refused(tmp_path: Path) -> None:
    path = _adapter(tmp_path / "a1", _factors(rank=2), rank=2)

    with EncoderSession(exported("bert")) as session:
        with pytest.raises(RuntimeFailure, match="adapter of another base: it has no slot model"):
            session.set_adapter(path)
        assert session.adapter is None


# --- releases -------------------------------------------------------------------------------------


class Device:
    """A model store with the real trial, and the owner's repository with r1 and a1."""

    def __init__(self, folder: Path) -> None:
        self.publisher = Publisher(folder / "repository")
        self.publisher.init()
        self.publisher.publish("tiny", "r1", exported("modernbert"))
        _adapter(folder / "a1", _factors(rank=2), rank=2)
        self.publisher.publish("tiny", "a1", folder / "a1")
        self.folder = folder / "models"
        self.store = self.open()

    def open(self) -> ModelStore:
        probe = child_probe(timeout_s=100)
        return ModelStore(self.folder, root=self.publisher.root(), probe=probe, device="d1")

    def offer(self, release: str) -> OfferModel:
        targets = self.publisher.releases()[f"tiny/{release}"]
        return OfferModel(f"o-{release}", "tiny", release, self.publisher.metadata(), targets)

    def install(self, release: str) -> Held:
        wanted, now = self.offer(release), datetime.now(UTC)
        for path in self.store.missing(wanted, now=now):
            self.store.put(path, self.publisher.read(path))
        return self.store.install(wanted, now=now)


def test_a_release_is_fetched_tried_swapped_in_and_mended(tmp_path: Path) -> None:
    device = Device(tmp_path)

    held = device.install("r1")
    over = device.install("a1")

    assert check_files(Path(held.bundle)).keys() == read_manifest(
        Path(held.bundle)
    ).files.keys() | {"symbiont.json"}
    assert (over.bundle, over.release) == (held.bundle, "a1")
    with open_session(over.bundle) as session:
        session.set_adapter(over.adapter_path)
        assert session.classify("a boat") in LABELS
    graph = Path(held.bundle) / GRAPH_FILE
    device.store.put("tiny/r1/" + GRAPH_FILE, graph.read_bytes())
    graph.write_bytes(b"altered")
    assert device.open().ready() == over
    assert graph.read_bytes() == (exported("modernbert") / GRAPH_FILE).read_bytes()


def test_other_answers_than_the_exported_fail_the_trial(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    golden = json.loads((folder / "golden.json").read_text())
    golden["rows"][0]["logits"][0] += 3.0
    (folder / "golden.json").write_text(json.dumps(golden))

    with pytest.raises(RuntimeFailure, match=r"its logits are \d\.\d+ from those of its export"):
        child_probe(timeout_s=100)(Held("tiny", "r1", str(folder)))


@pytest.mark.parametrize(
    "path", ["tiny/r1/other/model.onnx", "tiny/r1/onnx/../x", "tiny/r1/onnx/a/b"]
)
def test_only_the_one_folder_is_allowed_in_a_release(path: str, tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "repository")
    publisher.init()
    publisher.publish("tiny", "r1", exported("modernbert"))
    probe = child_probe(timeout_s=1)
    store = ModelStore(tmp_path / "m", root=publisher.root(), probe=probe, device="d")
    wanted = OfferModel("x", "tiny", "r1", publisher.metadata(), (path,))

    with pytest.raises(TrustError, match="not FAMILY/RELEASE/FILE"):
        store.missing(wanted, now=datetime.now(UTC))


def test_graph_rules_reach_into_the_folder(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    check_bundle(folder)
    with pytest.raises(TrustError, match=r"model_quantized\.onnx may not be loaded: .*'Gelu'"):
        check_bundle(folder, operators=frozenset({"Add"}) | _operators_but("Gelu"))
    (folder / "onnx" / "deeper").mkdir()
    with pytest.raises(TrustError, match="deeper is not a plain file"):
        check_bundle(folder)
    shutil.rmtree(folder / "onnx")
    (folder / "onnx").symlink_to(exported("modernbert") / "onnx")
    with pytest.raises(TrustError, match="onnx is not a plain file"):
        check_bundle(folder)


def _operators_but(name: str) -> frozenset[str]:
    from edge_sdk.graphs import OPERATORS

    return OPERATORS - {name}


def _factors(rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    factors = {}
    for name, (out, width) in read_manifest(exported("modernbert")).adapter_slots.items():
        if name.endswith(("Wqkv", "classifier")):
            factors[f"{name}.lora_A"] = rng.normal(size=(rank, width)).astype(np.float32) * 0.1
            factors[f"{name}.lora_B"] = rng.normal(size=(out, rank)).astype(np.float32) * 0.5
    return factors


def _adapter(folder: Path, factors: dict[str, np.ndarray], *, rank: int) -> Path:
    base = read_manifest(exported("modernbert"))
    write_adapter_release(folder, base, factors, release="a1", rank=rank, alpha=6.0)
    return folder / "adapter.onnx_adapter"
