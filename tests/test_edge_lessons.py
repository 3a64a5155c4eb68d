"""A device is taught by an LLM of another tokenizer: what it needs, what it keeps, what it says."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from edge_sdk.agent import EdgeDevice
from edge_sdk.algorithms.vocabulary import Vocabulary
from edge_sdk.measure import Stopwatch
from edge_sdk.train.local import Means
from edge_sdk.train.lora import start_factors
from edge_sdk.train.taught import learn_locally
from edge_sdk.wire.messages import AdapterUpdate, Refused, TeachAdapter, encode
from tests.edge_world import TASK, Coordinator, codec_for_rank_2, offer, releases
from tests.test_edge_device import asked, enrolled, opened
from tests.test_train_taught import large, task


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    torch.set_num_threads(1)
    made = Coordinator(tmp_path, releases(tmp_path))
    yield made
    made.close()


@pytest.fixture
def device(coordinator: Coordinator, tmp_path: Path) -> Iterator[EdgeDevice]:
    with opened(coordinator, tmp_path, "[train]\nthreads = 1") as made:
        enrolled(coordinator, made)
        asked(coordinator, made, offer(coordinator.publisher, "r1"), until=2)
        yield made


def lesson(**changes: object) -> TeachAdapter:
    codec = codec_for_rank_2()
    start = start_factors(dict(zip(codec.layout.names, codec.layout.shapes, strict=True)), 1)
    made = task(large(whole=False), start, whole=False)
    known = {"codec_id": codec.codec_id, "codec": codec.to_bytes()}
    return msgspec.structs.replace(made, **{**known, **changes})


def test_it_learns_and_keeps_vocabulary_and_table(
    coordinator: Coordinator, device: EdgeDevice, tmp_path: Path
) -> None:
    whole = lesson()
    (update,) = asked(coordinator, device, whole)
    (again,) = asked(coordinator, device, lesson(task_id="b", words=b"", codec=b""))

    assert isinstance(update, AdapterUpdate)
    assert isinstance(again, AdapterUpdate)
    assert (update.task_id, update.round, update.release) == ("lesson-0", 0, "r1")
    assert update.examples == len(whole.texts)  # not how many of them taught it
    assert not any(text.encode() in encode(update) for text in whole.texts)
    assert {"align", "train", "encode"} <= set(update.seconds)
    bundle = next((tmp_path / "state").rglob("genai_config.json")).parent
    (table,) = (tmp_path / "state" / "vocabularies").glob("mined-*.npy")
    words = Vocabulary.from_bytes(whole.words)
    wanted = learn_locally(
        whole, words, bundle, TASK, means=Means(threads=1), seed=whole.seed, cache=table.parent,
        watch=Stopwatch(),
    )  # fmt: skip
    change = codec_for_rank_2().decode(update.codes)
    for key, value in wanted.items():
        off = np.linalg.norm(change[key] - value)
        assert off <= 0.5 * np.linalg.norm(value) + 1e-6, key  # what is left is owed


def test_what_it_lacks_is_named_so_that_it_can_be_sent(
    coordinator: Coordinator, device: EdgeDevice
) -> None:
    for n, (changes, reason, lacks) in enumerate(
        (
            ({"words": b""}, "vocabulary is not here", ("words",)),
            ({"codec": b""}, "was not sent along", ("codec",)),
            ({"words_id": bytes(32)}, "not the one the task names", ()),
            ({"words": b"\xc0"}, "not a vocabulary", ()),
            ({"release": "r9"}, "task is for release r9", ()),
            ({"steps": 10_001}, "over this device's limit", ()),
            ({"labels": lesson().labels[1:]}, "differ in number", ()),
            ({"truth": b""}, "truth has 0 bytes", ()),
            ({"labels": ("x",) * len(lesson().labels)}, "its own log says why", ()),
        )
    ):
        (reply,) = asked(coordinator, device, lesson(task_id=f"bad-{n}", **changes))
        assert isinstance(reply, Refused), changes
        assert reason in reply.reason
        assert reply.lacks == lacks


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[train]\nenabled = false", "switched off"),
        ("[train]\nuplink_bytes_per_round = 10_000", "is for its own update"),
    ],
)
def test_its_owner_may_say_no(
    coordinator: Coordinator, tmp_path: Path, text: str, reason: str
) -> None:
    with opened(coordinator, tmp_path, text) as device:
        enrolled(coordinator, device)
        asked(coordinator, device, offer(coordinator.publisher, "r1"), until=2)
        (reply,) = asked(coordinator, device, lesson())

    assert isinstance(reply, Refused)
    assert reason in reply.reason
