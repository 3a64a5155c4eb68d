"""train: an encoder learns on a device by the same trainer, codec and twin as a decoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.codec import Compressor, FeedbackState, Layout
from coordinator.twin import Twin
from edge_sdk.encoders import EncoderSession
from edge_sdk.errors import DataError, Postponed, RuntimeFailure
from edge_sdk.measure import Stopwatch
from edge_sdk.train import lora
from edge_sdk.train.encoder_task import EncoderReader
from edge_sdk.train.kinds import opened
from edge_sdk.train.local import Means, rows_locally, train_locally
from edge_sdk.train.text_task import accuracy, label_probs
from edge_sdk.wire.messages import TextTask, TopLogits, TrainAdapter
from exporters.bundle import read_manifest, write_adapter_release
from tests.encoders_tiny import LABELS, TASK, TEXTS, exported

WORDS = {"open": "what is the river", "list": "give me ideas", "name": "sort these animals"}
EXAMPLES = [(f"{WORDS[label]} {i % 7}", label) for i in range(36) for label in [LABELS[i % 3]]]
SPEC = lora.LoraSpec(rank=4, alpha=8.0, targets=("Wqkv", "Wi", "Wo", "classifier"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _order(**changes: object) -> TrainAdapter:
    settings: dict[str, object] = {
        "task_id": "t",
        "round": 0,
        "family": "tiny",
        "release": "r1",
        "adapter": b"",
        "adapter_seed": 1,
        "rank": SPEC.rank,
        "alpha": SPEC.alpha,
        "targets": SPEC.targets,
        "codec_id": "none",
        "codec": b"",
        "steps": 60,
        "batch": 12,
        "lr": 0.01,
        "synthetic_weight": 0.0,
        "bytes_target": 0,
        "seed": 3,
    }
    return TrainAdapter(**{**settings, **changes})  # type: ignore[arg-type]


def _train(
    bundle: Path,
    *,
    checkpoint: Path | None = None,
    gate: Callable[[], None] | None = None,
    **changes: object,
) -> lora.Factors:
    return train_locally(
        _order(**changes),
        bundle,
        TASK,
        EXAMPLES,
        [],
        means=Means(max_tokens=32, checkpoint=checkpoint, checkpoint_s=0.0),
        seed=3,
        watch=Stopwatch(),
        gate=gate,
    )


def test_torch_says_what_the_graph_says_and_no_label_is_read() -> None:
    model, reader = opened(exported("modernbert"), TASK, dtype=torch.float32)
    lora.Adapter(model, SPEC)  # LoRA layers at zero change nothing

    probs = label_probs(model, reader, TEXTS).numpy()

    with EncoderSession(exported("modernbert")) as session:
        np.testing.assert_allclose(probs, session.label_probabilities(TEXTS), atol=0.03)
    found = [
        model(input_ids=torch.tensor([reader.labelled(["a boat"], [label]).ids[0]])).logits
        for label in LABELS
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_whole_round_from_examples_to_an_adapter_on_the_device(tmp_path: Path) -> None:
    bundle = exported("modernbert")
    texts, labels = [text for text, _ in EXAMPLES], [label for _, label in EXAMPLES]

    change = _train(bundle)

    # Device: the change as a code; coordinator: decoded into the twin of the same bundle.
    codec = Compressor.deadzone(
        Layout(tuple(change), tuple(tuple(v.shape) for v in change.values()))
    )
    code = codec.encode(change, FeedbackState(), 0).data
    model, reader = opened(bundle, TASK, dtype=torch.float32)
    twin = Twin("tiny", model, reader, SPEC, seed=1)
    before = twin.accuracy(texts, labels)
    twin.set_global(lora.add(twin.factors, codec.decode(code)))
    after = twin.accuracy(texts, labels)
    assert after >= 0.9 > before
    # And down again, as an adapter over the bundle that the device already has.
    manifest = read_manifest(bundle)
    write_adapter_release(
        tmp_path / "a1", manifest, twin.factors, release="a1", rank=SPEC.rank, alpha=SPEC.alpha
    )
    with EncoderSession(bundle) as session:
        session.set_adapter(tmp_path / "a1" / "adapter.onnx_adapter")
        right = [a == b for a, b in zip(session.classify_many(texts), labels, strict=True)]
        np.testing.assert_allclose(session.label_probabilities(TEXTS), twin.probs(TEXTS), atol=0.08)
    assert np.mean(right) >= 0.9


def test_the_same_order_gives_the_same_change() -> None:
    first, second = (_train(exported("modernbert"), steps=2) for _ in range(2))

    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_put_off_it_goes_on_where_it_was_to_the_same_change(tmp_path: Path) -> None:
    bundle, kept, steps = exported("modernbert"), tmp_path / "checkpoint", []

    def gate(stop_at: int) -> Callable[[], None]:
        def look() -> None:
            if len(steps) == stop_at:
                raise Postponed("not now")
            steps.append(1)

        return look

    with pytest.raises(Postponed):
        _train(bundle, steps=6, checkpoint=kept, gate=gate(4))
    assert kept.exists()
    steps.clear()
    change = _train(bundle, steps=6, checkpoint=kept, gate=gate(-1))

    assert len(steps) == 2
    assert not kept.exists()
    whole = _train(bundle, steps=6)
    assert all(np.array_equal(change[name], whole[name]) for name in whole)


def test_it_says_nothing_of_next_tokens() -> None:
    task = TopLogits("logits", 0, "tiny", "r1", ("a boat",), ("open",), 4)

    with pytest.raises(RuntimeFailure, match="release r1 is an encoder"):
        rows_locally(_order(), task, exported("modernbert"), TASK, means=Means(), watch=Stopwatch())


def test_an_order_starts_from_the_adapter_it_brings() -> None:
    bundle = exported("modernbert")
    plain = _train(bundle, steps=2)
    start = lora.to_bytes(lora.add(plain, plain))

    other = _train(bundle, steps=2, adapter=start)

    assert not np.array_equal(plain["classifier.lora_B"], other["classifier.lora_B"])


def test_what_does_not_fit_is_refused() -> None:
    bundle = exported("modernbert")
    strange = TextTask("t", "{text}", "{label}", ("shut",), (" shut",))
    with pytest.raises(RuntimeFailure, match="no label 'shut' of task t"):
        opened(bundle, strange, dtype=torch.float32)
    _, reader = opened(bundle, TASK, dtype=torch.float32)
    with pytest.raises(DataError, match="label 'shut' is not of task kind"):
        reader.labelled(["a door"], ["shut"])
    assert isinstance(reader, EncoderReader)
    assert len(reader.prompts(["boat " * 99])[0]) == 48


def test_what_torch_finds_likeliest_is_what_the_graph_finds() -> None:
    model, reader = opened(exported("bert"), _four(), dtype=torch.float32)

    with EncoderSession(exported("bert"), task=_four()) as session:
        found = session.classify_many(TEXTS)

    assert accuracy(model, reader, TEXTS, found) == 1.0


def _four() -> TextTask:
    return TextTask("four", "{text}", "{label}", ("a", "b", "c", "d"), ("a", "b", "c", "d"))
