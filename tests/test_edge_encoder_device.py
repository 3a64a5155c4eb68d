"""A whole device with an encoder: enrolled, sent releases, asked, measured and taught."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from compression.codec import Compressor, Layout
from edge_sdk.agent import EdgeDevice
from edge_sdk.errors import RuntimeFailure
from edge_sdk.wire.messages import AdapterUpdate, ModelReport, Score, Scores, WantFiles
from exporters.bundle import read_manifest, write_adapter_release
from exporters.publisher import Publisher
from tests.edge_world import TASK, Coordinator, config, example_set, offer, order
from tests.encoders_tiny import exported

NAME = "kitchen-2"
TARGETS = ("classifier",)


@pytest.fixture
def device(coordinator: Coordinator, tmp_path: Path) -> Iterator[EdgeDevice]:
    with enrolled(coordinator, tmp_path) as made:
        yield made


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    publisher = Publisher(tmp_path / "repository")
    publisher.init()
    bundle = exported("modernbert")
    publisher.publish("tiny", "r1", bundle)
    factors = {
        "classifier.lora_A": np.full((2, 64), 0.1, np.float32),
        "classifier.lora_B": np.array([[-9.0] * 2, [9.0] * 2, [0.0] * 2], np.float32),
    }
    base = read_manifest(bundle)
    write_adapter_release(tmp_path / "a1", base, factors, release="a1", rank=2, alpha=4.0)
    publisher.publish("tiny", "a1", tmp_path / "a1")
    made = Coordinator(tmp_path, publisher)
    yield made
    made.close()


@contextmanager
def enrolled(coordinator: Coordinator, tmp_path: Path) -> Iterator[EdgeDevice]:
    settings = config(tmp_path, "[data]\nheld_out = 0.3")
    with EdgeDevice(settings, link=coordinator.broker.link(NAME)) as made:
        stop = threading.Event()

        def answer() -> None:
            while not stop.is_set():
                coordinator.courier.wait_for_mail(0.05)
                coordinator.turn()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            made.enrol(coordinator.code(NAME), timeout_s=10)
        finally:
            stop.set()
            thread.join()
        made.add_examples(example_set(30))
        yield made


def asked(coordinator: Coordinator, device: EdgeDevice, message, until: int = 1) -> list:  # type: ignore[no-untyped-def]
    coordinator.replies.clear()
    coordinator.send(NAME, message)
    return list(coordinator.talk(device, until=until))


def test_the_whole_life_of_a_device_with_an_encoder(
    coordinator: Coordinator, device: EdgeDevice
) -> None:
    want, report = asked(coordinator, device, offer(coordinator.publisher, "r1"), until=2)

    assert isinstance(want, WantFiles)
    assert any(path.endswith("onnx/model_quantized.onnx") for path in want.paths)
    assert isinstance(report, ModelReport)
    assert (report.release, report.examples) == ("r1", len(device._examples.held_out()))
    assert report.tokens_per_s > 0
    assert device.classify("open request") in TASK.labels
    assert device.embed(["a boat"]).shape == (1, 64)
    with pytest.raises(RuntimeFailure, match="r1 is an encoder, which labels and embeds"):
        device.generate("Request: hello")
    with pytest.raises(RuntimeFailure, match="r1 is an encoder, which labels and embeds"):
        device.stream("Request: hello")

    (scores,) = asked(coordinator, device, Score("score", "r1", ("a", "b"), ("open", "list")))
    assert isinstance(scores, Scores)
    assert len(scores.scores) == 2

    codec = Compressor.deadzone(
        Layout(("classifier.lora_A", "classifier.lora_B"), ((2, 64), (3, 2)))
    )
    task = order(targets=TARGETS, codec_id=codec.codec_id, codec=codec.to_bytes())
    (update,) = asked(coordinator, device, task)
    assert isinstance(update, AdapterUpdate)
    change = codec.decode(update.codes)
    assert np.abs(change["classifier.lora_B"]).max() > 0

    ids = [2, 40, 50, 3]
    before = device.session.next_logits(ids)
    _, adapted = asked(coordinator, device, offer(coordinator.publisher, "a1"), until=2)
    assert isinstance(adapted, ModelReport)
    assert adapted.release == "a1"
    assert np.abs(device.session.next_logits(ids) - before).max() > 0.5


def test_a_restart_opens_the_encoder_again(coordinator: Coordinator, tmp_path: Path) -> None:
    with enrolled(coordinator, tmp_path) as device:
        asked(coordinator, device, offer(coordinator.publisher, "r1"), until=2)
        label = device.classify("name three rivers")

    settings = config(tmp_path)
    with EdgeDevice(settings, link=coordinator.broker.link(NAME)) as again:
        assert again.classify("name three rivers") == label
