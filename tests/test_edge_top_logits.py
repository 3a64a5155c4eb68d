"""A device tells what the adapter it has just trained finds likeliest on public texts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.int4_torch import load_slm
from edge_sdk.agent import EdgeDevice
from edge_sdk.algorithms.logit_rows import unpack
from edge_sdk.algorithms.vocabulary import Vocabulary
from edge_sdk.train.local import quickest_dtype
from edge_sdk.train.lora import Adapter, Factors, LoraSpec, add, start_factors
from edge_sdk.train.teaching import lesson_texts, logit_table, places_of
from edge_sdk.train.text_task import TaskReader
from edge_sdk.wire.messages import AdapterUpdate, LogitRows, Refused, TopLogits
from tests.edge_world import TASK, Coordinator, codec_for_rank_2, offer, order, releases
from tests.test_edge_device import asked, enrolled, example_set, opened

TEXTS, LABELS = ("open the door", "list them all", "a name"), ("open", "list", "name")


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
        made.add_examples(example_set(30))
        asked(coordinator, made, offer(coordinator.publisher, "r1"), until=2)
        yield made


def rows(task_id: str = "rows-0", **changes: object) -> TopLogits:
    fields: dict[str, object] = {
        "task_id": task_id, "round": 0, "family": "tiny", "release": "r1",
        "texts": TEXTS, "labels": LABELS, "kept": 6, "whole": True,
    }  # fmt: skip
    return TopLogits(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_rows_are_those_of_the_adapter_trained_here(
    coordinator: Coordinator, device: EdgeDevice, tmp_path: Path
) -> None:
    (update,) = asked(coordinator, device, order(lr=0.2))
    (reply,) = asked(coordinator, device, rows())

    assert isinstance(update, AdapterUpdate)
    assert isinstance(reply, LogitRows)
    bundle = next((tmp_path / "state").rglob("genai_config.json")).parent
    adapter = Adapter(load_slm(bundle, dtype=quickest_dtype()), LoraSpec(2, 4.0, ("q_proj",)))
    start = start_factors(adapter.layout, order().adapter_seed)
    reader = TaskReader.from_folder(TASK, bundle)
    texts = lesson_texts(reader, list(zip(TEXTS, LABELS, strict=True)), whole=True)
    V = len(Vocabulary.of(reader.tokenizer))
    table = unpack(places_of(texts), reply.kept, V, reply.truth, reply.ids, reply.logps)

    def off_by(factors: Factors) -> float:
        adapter.load(factors)
        said = logit_table(adapter.model, texts, kept=6, vocabulary=V)
        return float(np.abs(said.truth - table.truth).max())

    trained = add(start, codec_for_rank_2().decode(update.codes))
    assert (reply.round, reply.release, reply.task_id) == (0, "r1", "rows-0")
    assert reply.places == table.places.digest
    assert off_by(trained) < 0.7 * off_by(start)  # what is left is the encoding of the update


def test_what_cannot_be_told_is_refused_with_a_reason(
    coordinator: Coordinator, device: EdgeDevice
) -> None:
    (reply,) = asked(coordinator, device, rows("a"))
    assert isinstance(reply, Refused)
    assert "did not train in round 0" in reply.reason

    asked(coordinator, device, order())
    for task, said in (
        (rows("b", round=1), "did not train in round 1"),
        (rows("c", release="r9"), "task is for release r9"),
        (rows("d", family="other"), "trained release r1, not r1"),
        (rows("e", labels=LABELS[:2]), "differ in number"),
        (rows("f", labels=("x", "y", "z")), "its own log says why"),
        (rows("g", texts=("a" * 500, "b", "c")), "its own log says why"),
    ):
        (reply,) = asked(coordinator, device, task)
        assert isinstance(reply, Refused)
        assert said in reply.reason
