"""A session answers with what ONNX Runtime computes, refuses clearly, and stays usable after."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compression.int4_torch import load_slm
from edge_sdk.errors import DataError, RuntimeFailure
from edge_sdk.runtime import SlmSession
from edge_sdk.train.text_task import TaskReader, label_probs
from edge_sdk.wire.messages import TextTask
from tests.edge_world import TASK, releases

TEXTS = ["open the door", "list", "name three rivers of the north, and say where each one ends"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases(tmp_path_factory.mktemp("runtime")).folder / "targets" / "tiny"


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[SlmSession]:
    with SlmSession.open(folder / "r1") as opened:
        yield opened


@pytest.mark.parametrize("words", [(" open", " list", " name"), ("open", "list", "name")])
def test_labels_agree_with_torch_on_the_same_weights(
    words: tuple[str, ...], session: SlmSession, folder: Path
) -> None:
    """Both forms: words told apart by their first token, and by the sum over all tokens."""
    import torch

    torch.set_num_threads(1)
    task = TextTask(TASK.name, TASK.prompt, TASK.generation_prompt, TASK.labels, words)
    reader = TaskReader.from_folder(task, folder / "r1", max_tokens=128)
    model = load_slm(folder / "r1", dtype=torch.float32)

    expected = label_probs(model, reader, TEXTS).numpy()

    np.testing.assert_allclose(session.label_probabilities(TEXTS, task), expected, atol=2e-3)


def test_a_batch_gives_what_each_text_gives_alone(session: SlmSession) -> None:
    together = session.label_probabilities(TEXTS)
    alone = np.concatenate([session.label_probabilities([text]) for text in TEXTS])

    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert session.classify_many(TEXTS) == [session.classify(text) for text in TEXTS]
    np.testing.assert_allclose(together.sum(axis=1), 1.0, atol=1e-5)


def test_more_short_texts_than_the_runtime_takes_at_once(session: SlmSession) -> None:
    assert session.label_probabilities(["list"] * 70).shape[0] == 70


def test_scores_are_the_labels_probabilities(session: SlmSession) -> None:
    everything = session.label_probabilities(TEXTS)

    scores = session.score(TEXTS, ["open", "list", "name"])

    np.testing.assert_allclose(scores, everything.diagonal(), atol=1e-6)


def test_a_stream_is_the_generated_text_in_pieces(session: SlmSession) -> None:
    pieces = list(session.stream("Request: hello", max_tokens=12))

    assert "".join(pieces) == session.generate("Request: hello", max_tokens=12)
    assert len(pieces) > 1
    assert session.tokens_per_s > 0


def test_sampling_follows_its_seed(session: SlmSession) -> None:
    options = {"temperature": 1.5, "max_tokens": 12}

    one, again, other = (
        session.generate("Request: hello", seed=seed, **options) for seed in (1, 1, 2)
    )

    assert one == again != other
    greedy = session.generate("Request: hello", max_tokens=12)
    assert session.generate("Request: hello", temperature=0, max_tokens=12) == greedy


def test_a_text_that_ends_in_the_pad_token_is_read_to_its_end(session: SlmSession) -> None:
    """The tiny model's pad token is a word of its vocabulary; genai would mask it as padding."""
    plain, padded = (session.top_logits(text, 3)[1] for text in ("hello", "hello<|end|>"))

    assert not np.allclose(plain, padded)


def test_an_adapter_is_put_on_and_taken_off_without_loading(
    session: SlmSession, folder: Path
) -> None:
    plain = session.label_probabilities(TEXTS)

    session.set_adapter(folder / "a1" / "adapter.onnx_adapter")
    changed = session.label_probabilities(TEXTS)
    session.set_adapter(folder / "a1" / "adapter.onnx_adapter")
    again = session.label_probabilities(TEXTS)
    session.set_adapter(None)

    assert np.abs(changed - plain).max() > 0.01
    np.testing.assert_array_equal(again, changed)
    np.testing.assert_array_equal(session.label_probabilities(TEXTS), plain)


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    from edge_sdk.adapter_file import write_adapter

    path = tmp_path / "foreign.onnx_adapter"
    name = "model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A": np.ones((2, 32)), f"{name}.lora_B": np.ones((64, 2))}
    write_adapter(factors, rank=2, alpha=2.0, slots={name: (64, 32)}, path=path)
    with SlmSession(folder / "r1") as session:
        before = session.classify("hello")
        with pytest.raises(RuntimeFailure, match="adapter of another base"):
            session.set_adapter(path)
        with pytest.raises(RuntimeFailure, match="not an adapter file"):
            session.set_adapter(folder / "r1" / "config.json")
        with pytest.raises(RuntimeFailure, match="not an adapter file"):
            session.set_adapter(tmp_path / "absent.onnx_adapter")
        assert session.classify("hello") == before


def test_refusals_leave_the_session_usable(session: SlmSession) -> None:
    refusals = [
        (lambda: session.generate(""), "prompt is empty"),
        (lambda: session.generate("x" * 500), "500 tokens and the model's context is 128"),
        (lambda: session.stream(" "), "prompt is empty"),
        (lambda: session.generate("x", nonsense=1), "unknown option 'nonsense'; known are adapter"),
        (lambda: session.classify(" "), "is empty"),
        (lambda: session.score(["a"], []), "1 texts came with 0 labels"),
    ]
    for ask, said in refusals:
        with pytest.raises(RuntimeFailure, match=said):
            ask()
    with pytest.raises(DataError, match="its labels are open, list, name"):
        session.score(["a"], ["nonsense"])

    assert session.classify("x" * 500) in TASK.labels  # a long text to classify is cut


def test_the_module_loads_no_runtime_before_a_model_is_opened() -> None:
    code = (
        "import sys, edge_sdk.runtime, edge_sdk.conversation\n"
        "heavy = {'onnxruntime', 'onnxruntime_genai', 'tokenizers', 'jinja2', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout == "[]\n"


def test_a_folder_that_is_no_bundle_and_a_closed_session(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="is not a model bundle"):
        SlmSession(tmp_path)
    session = SlmSession(folder / "r2")
    session.close()
    session.close()
    with pytest.raises(RuntimeFailure, match="session is closed"):
        session.classify("hello")


def test_running_a_model_leaves_no_trace_and_opens_no_socket(folder: Path, tmp_path: Path) -> None:
    """With telemetry on, the runtimes write a device id and an event queue below the home."""
    code = (
        "import sys, os, time\n"
        "from edge_sdk import SlmSession\n"
        "with SlmSession(sys.argv[1]) as s: s.generate('Request: hello', max_tokens=3)\n"
        "time.sleep(0.3)\n"
        "print([os.readlink(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd')"
        " if os.path.islink(f'/proc/self/fd/{f}')])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "r1")],
        cwd=Path(__file__).resolve().parent.parent,
        env={**environment, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )

    assert "socket:" not in done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
