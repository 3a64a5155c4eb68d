"""Several adapters beside one model: by name, per request, switched and freed without reloading."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_sdk.adapter_file import write_adapter
from edge_sdk.errors import RuntimeFailure
from edge_sdk.runtime import SlmSession
from edge_sdk.wire.manifest import MANIFEST_FILE, decode_manifest
from tests.edge_world import releases

PROMPT = "Request: hello"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle r1 and the adapters one and two for it."""
    folder = releases(tmp_path_factory.mktemp("adapters")).folder / "targets" / "tiny"
    slots = decode_manifest((folder / "r1" / MANIFEST_FILE).read_bytes()).adapter_slots
    for seed, name in ((1, "one"), (2, "two")):
        rng = np.random.default_rng(seed + 30)
        factors = {}
        for slot, (out_features, in_features) in slots.items():
            factors[f"{slot}.lora_A"] = rng.normal(size=(seed, in_features)).astype(np.float32)
            factors[f"{slot}.lora_B"] = rng.normal(size=(out_features, seed)).astype(np.float32)
        path = folder / f"{name}.onnx_adapter"
        write_adapter(factors, rank=seed, alpha=1.0, slots=slots, path=path)
    return folder


@pytest.fixture
def session(folder: Path) -> Iterator[SlmSession]:
    with SlmSession.open(folder / "r1", max_tokens=8) as opened:
        yield opened


def test_each_request_has_the_adapter_it_names(session: SlmSession, folder: Path) -> None:
    """Interleaved, in batches and conversations, and the session's own choice stays as it was."""
    plain = session.generate(PROMPT)
    for name in ("one", "two"):
        session.load_adapter(name, folder / f"{name}.onnx_adapter")
    assert session.adapters == ("one", "two")
    one, two = (session.stream(PROMPT, adapter=name) for name in ("one", "two"))
    texts = ["", ""]
    for first, second in zip(one, two, strict=False):
        texts = [texts[0] + first, texts[1] + second]

    alone = [session.generate(PROMPT, adapter=name) for name in ("one", "two")]

    assert len({plain, *alone}) == 3
    assert all(text and whole.startswith(text) for whole, text in zip(alone, texts, strict=True))
    assert session.generate_many([PROMPT, PROMPT], adapter="two") == [alone[1]] * 2
    assert session.generate(PROMPT) == plain
    assert session.adapter is None


def test_the_sessions_adapter_is_switched_by_name_and_left_out_by_request(
    session: SlmSession, folder: Path
) -> None:
    plain, logits = session.generate(PROMPT), session.next_logits([1, 2])
    session.load_adapter("one", folder / "one.onnx_adapter")
    with_one = session.generate(PROMPT, adapter="one")

    session.set_adapter("one")

    assert session.generate(PROMPT) == with_one
    assert session.generate(PROMPT, adapter="") == plain
    assert session.adapter == folder / "one.onnx_adapter"
    assert np.abs(session.next_logits([1, 2]) - logits).max() > 0.01
    session.set_adapter(None)
    np.testing.assert_array_equal(session.next_logits([1, 2]), logits)
    assert (session.adapter, session.adapters) == (None, ("one",))


def test_an_answer_keeps_its_adapter_when_the_session_changes(
    session: SlmSession, folder: Path
) -> None:
    session.load_adapter("one", folder / "one.onnx_adapter")
    expected = session.generate(PROMPT, adapter="one")
    session.set_adapter("one")
    answer = session.stream(PROMPT)
    first = next(answer)

    session.set_adapter(folder / "two.onnx_adapter")

    assert first + "".join(answer) == expected
    assert session.adapters == ("one",)  # a file without a name is not listed


def test_files_set_without_a_name_do_not_pile_up(session: SlmSession, folder: Path) -> None:
    """Each is freed by the next change once no answer uses it."""
    one, two = (folder / f"{name}.onnx_adapter" for name in ("one", "two"))
    session.set_adapter(one)
    answer = session.stream(PROMPT)
    next(answer)
    for path in (two, one, two, None, two):
        session.set_adapter(path)
    answer.close()
    session.set_adapter(None)

    with session._model.shelf() as shelf:
        assert shelf._paths == {}


def test_a_graph_that_cannot_be_opened_leaves_the_one_before(folder: Path, tmp_path: Path) -> None:
    """An adapter needs a larger graph; without it, and without a loaded adapter's file, no harm."""
    bundle = Path(shutil.copytree(folder / "r1", tmp_path / "bundle"))
    kept = Path(shutil.copy(folder / "one.onnx_adapter", tmp_path))
    with SlmSession(bundle) as session:
        plain = session.generate(PROMPT, max_tokens=5)
        good = (bundle / "answer_adapted.onnx").read_bytes()
        (bundle / "answer_adapted.onnx").write_bytes(b"")
        with pytest.raises(RuntimeFailure, match="cannot be loaded"):
            session.load_adapter("one", kept)
        assert session.generate(PROMPT, max_tokens=5) == plain
        (bundle / "answer_adapted.onnx").write_bytes(good)
        session.load_adapter("one", kept)
        adapted = session.generate(PROMPT, max_tokens=5, adapter="one")
        data = kept.read_bytes()
        kept.unlink()
        with pytest.raises(RuntimeFailure, match="is not an adapter file"):
            session.next_graph()
        assert session.generate(PROMPT, max_tokens=5, adapter="one") == adapted
        kept.write_bytes(data)
        assert session.next_graph()
        assert not session.next_graph()
        assert session.generate(PROMPT, max_tokens=5, adapter="one") == adapted


def test_a_conversation_reads_anew_with_another_adapter(session: SlmSession, folder: Path) -> None:
    session.load_adapter("one", folder / "one.onnx_adapter")
    talk = session.conversation()
    for _ in talk.say("hi"):
        pass

    answer = talk.say("ho", adapter="one")
    text = "".join(answer)

    assert answer.read_tokens == answer.prompt_tokens
    messages = talk.messages[:-1]
    assert text == session.generate(session.chat_prompt(messages), adapter="one", stop="\nUser:")


def save_halves(path: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    """An adapter of ones for one slot, as no exporter of ours would write it."""
    slot = "model.layers.0.self_attn.q_proj"
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(
        {
            f"{slot}.lora_{half}": onnxruntime.OrtValue.ortvalue_from_numpy(
                np.ones(shape, np.float32)
            )
            for half, shape in shapes.items()
        }
    )
    adapter.export_adapter(str(path))
    return path


def test_refusals_name_what_is_loaded_and_change_nothing(
    session: SlmSession, folder: Path, tmp_path: Path
) -> None:
    path = folder / "one.onnx_adapter"
    session.load_adapter("one", path)
    session.set_adapter("one")
    damaged = tmp_path / "damaged.onnx_adapter"
    damaged.write_bytes(path.read_bytes()[:200])
    uneven = save_halves(tmp_path / "uneven.onnx_adapter", {"A": (64, 2), "B": (3, 64)})
    single = save_halves(tmp_path / "single.onnx_adapter", {"A": (64, 2)})
    before = session.generate(PROMPT)
    for refused, said in (
        (lambda: session.load_adapter("one", path), "loaded as 'one' already; unload it first"),
        (lambda: session.load_adapter("", path), "an adapter needs a name"),
        (lambda: session.load_adapter("x", uneven), "factors of rank 2 and 3"),
        (lambda: session.load_adapter("x", single), "lacks one of its two factors"),
        (lambda: session.load_adapter("x", damaged), "is not an adapter file"),
        (lambda: session.load_adapter("x", tmp_path), "is not an adapter file"),
        (lambda: session.set_adapter("two"), r"not an adapter file, and no adapter 'two' .*: one"),
        (lambda: session.unload_adapter("two"), r"no adapter 'two' is loaded \(loaded: one\)"),
        (lambda: session.unload_adapter("one"), "adapter 'one' is in use; set_adapter another"),
        (lambda: session.generate(PROMPT, adapter="two"), r"no adapter 'two' .*loaded: one"),
    ):
        with pytest.raises(RuntimeFailure, match=said):
            refused()

    assert session.generate(PROMPT) == before
    session.set_adapter(None)
    session.unload_adapter("one")
    assert session.adapters == ()
