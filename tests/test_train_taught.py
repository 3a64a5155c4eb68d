"""A lesson on a real bundle: the change is the coordinator's own, whatever the tokenizers."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from compression.int4_torch import load_slm
from coordinator.peers import Bridge, Peer
from edge_sdk.algorithms.alignment import dtw, greedy
from edge_sdk.algorithms.logit_rows import pack
from edge_sdk.algorithms.selection import surer
from edge_sdk.algorithms.vocabulary import Vocabulary
from edge_sdk.errors import Postponed, RemoteProtocolError
from edge_sdk.measure import Stopwatch
from edge_sdk.train.local import Means, quickest_dtype
from edge_sdk.train.lora import Adapter, Factors, LoraSpec, delta, start_factors, to_bytes
from edge_sdk.train.taught import MOST_TABLES, learn_locally
from edge_sdk.train.teaching import Lesson, target_bytes
from edge_sdk.train.text_task import TaskReader
from edge_sdk.wire.messages import TeachAdapter
from tests.edge_world import TASK, releases
from tests.learning_world import examples
from tests.mkt_world import model_of, pieces

SPEC = LoraSpec(2, 4.0, ("q_proj",))
PAIRS = [(text, TASK.labels[i % 3]) for i, (text, _) in enumerate(examples(9, seed=4))]
HOW = Lesson(0.5, 4, 3, 2e-2)
MEANS = Means(threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("taught")
    releases(folder)
    (found,) = folder.rglob("tiny/r1/genai_config.json")
    return found.parent


def large(*, whole: bool) -> Peer:
    """The LLM: a tokenizer of pieces, where the bundle's has bytes."""
    reader = TaskReader(TASK, pieces(), max_tokens=60)
    return Peer(Adapter(model_of("pieces"), SPEC), reader, PAIRS, (), whole=whole)


def small(bundle: Path, *, whole: bool) -> Peer:
    """The bundle's model as the coordinator's twin has it, with the adapter that it starts from."""
    reader = TaskReader.from_folder(TASK, bundle)
    adapter = Adapter(load_slm(bundle, dtype=quickest_dtype()), SPEC)
    adapter.load(start_factors(adapter.layout, 1))
    return Peer(adapter, reader, PAIRS, (), whole=whole)


def task(teacher: Peer, start: Factors, *, whole: bool, by_bytes: bool = False) -> TeachAdapter:
    table = teacher.table(8)
    truth, ids, logps = pack(table, len(teacher.words))
    texts, labels = (tuple(column) for column in zip(*PAIRS, strict=True))
    return TeachAdapter(
        "lesson-0", 0, "tiny", "r1", to_bytes(start), SPEC.rank, SPEC.alpha, SPEC.targets, "codec",
        b"", HOW.steps, HOW.batch, HOW.lr, 0, 5, texts, labels, whole, HOW.share, by_bytes,
        bytes.fromhex(teacher.words.digest), teacher.words.to_bytes(),
        table.places.tokens.astype("<i4").tobytes(),
        np.diff(table.places.starts).astype("<i4").tobytes(), table.kept, truth, ids, logps,
    )  # fmt: skip


def learned(order: TeachAdapter, bundle: Path, cache: Path, **how: object) -> Factors:
    words = Vocabulary.from_bytes(order.words)
    return learn_locally(
        order, words, bundle, TASK, seed=order.seed, cache=cache, watch=Stopwatch(),
        **{"means": MEANS, **how},
    )  # fmt: skip


@pytest.mark.parametrize("whole", [False, True], ids=["labels", "whole"])
@pytest.mark.parametrize("by_bytes", [False, True], ids=["dtw", "greedy"])
def test_the_change_is_the_coordinators(
    bundle: Path, tmp_path: Path, whole: bool, by_bytes: bool
) -> None:
    teacher, pupil = large(whole=whole), small(bundle, whole=whole)
    start = pupil.adapter.factors()
    order = task(teacher, start, whole=whole, by_bytes=by_bytes)

    change = learned(order, bundle, tmp_path)

    sizes = target_bytes(pupil_reader(bundle), PAIRS, whole=whole)
    said = teacher.table(8)
    chosen = surer(pupil.losses(), said.losses(), sizes)
    assert chosen.any()
    targets = Bridge(teacher, pupil, greedy if by_bytes else dtw).carry(said)
    pupil.learn(targets, chosen, HOW, seed=order.seed)
    wanted = delta(pupil.adapter.factors(), start)
    assert max(float(np.abs(value).max()) for value in wanted.values()) > 1e-3
    for key, value in wanted.items():
        assert np.allclose(change[key], value, atol=1e-6), key
    assert [path.name for path in tmp_path.iterdir()] == [
        f"mined-{teacher.words.digest[:24]}-{pupil.words.digest[:24]}.npy"
    ]


def pupil_reader(bundle: Path) -> TaskReader:
    return TaskReader.from_folder(TASK, bundle)


def test_what_it_knows_better_teaches_it_nothing(bundle: Path, tmp_path: Path) -> None:
    """An LLM that gives each truth no chance: only the labels are learned, by lambda's weight."""
    teacher, pupil = large(whole=False), small(bundle, whole=False)
    start = pupil.adapter.factors()
    order = task(teacher, start, whole=False)
    places, kept = np.frombuffer(order.tokens, "<i4"), order.kept
    ids = np.stack([np.setdiff1d(np.arange(kept + 1), [token])[:kept] for token in places])
    logps = np.full(ids.shape, np.log(1 / (kept + 1)))
    truth = np.full(len(places), -60.0, "<f4")
    lie = {"truth": truth, "ids": ids.astype("<u2"), "logps": logps.astype("<f2")}
    order = msgspec.structs.replace(order, **{key: value.tobytes() for key, value in lie.items()})

    change = learned(order, bundle, tmp_path)

    none = np.zeros(len(PAIRS), bool)
    pupil.learn(Bridge(teacher, pupil).carry(teacher.table(8)), none, HOW, seed=order.seed)
    wanted = delta(pupil.adapter.factors(), start)
    assert all(np.allclose(change[key], wanted[key], atol=1e-6) for key in wanted)


def test_after_a_pause_it_ends_the_same(bundle: Path, tmp_path: Path) -> None:
    teacher = large(whole=False)
    start = small(bundle, whole=False).adapter.factors()
    order = task(teacher, start, whole=False)
    calls = []

    def gate() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Postponed("not now")

    kept = Means(threads=1, checkpoint=tmp_path / "training.checkpoint", checkpoint_s=0.0)
    whole = learned(order, bundle, tmp_path, means=kept)
    with pytest.raises(Postponed):
        learned(order, bundle, tmp_path, means=kept, gate=gate)
    assert kept.checkpoint is not None
    assert kept.checkpoint.exists()
    rest = learned(order, bundle, tmp_path, means=kept, gate=gate)

    assert len(calls) == 3 + HOW.steps - 2
    assert all(np.array_equal(whole[key], rest[key]) for key in whole)
    assert not kept.checkpoint.exists()


def test_rows_that_cannot_be_are_refused(bundle: Path, tmp_path: Path) -> None:
    teacher = large(whole=False)
    order = task(teacher, small(bundle, whole=False).adapter.factors(), whole=False)
    n, places, vocabulary = len(PAIRS), len(order.tokens) // 4, len(teacher.words)
    nan = np.frombuffer(order.logps, "<f2").copy()
    nan[3] = np.nan
    for changes, said in (
        ({"lengths": order.lengths[:-4]}, "not about its 9 texts"),
        ({"lengths": bytes(4 * n)}, "do not add up"),
        ({"tokens": b"\xff\xff\xff\x7f" * places}, f"outside the vocabulary of {vocabulary}"),
        ({"truth": order.truth[:-4]}, "truth has"),
        ({"logps": nan.tobytes()}, "not finite"),
        ({"adapter": b"rubbish"}, "not an adapter"),
        ({"texts": order.texts[:-1]}, "not about its 8 texts"),
    ):
        with pytest.raises(RemoteProtocolError, match=said):
            learned(msgspec.structs.replace(order, **changes), bundle, tmp_path)


def test_a_vocabulary_survives_its_bytes_and_nothing_else_does() -> None:
    words = Vocabulary.of(pieces())

    assert Vocabulary.from_bytes(words.to_bytes()) == words
    assert Vocabulary.from_bytes(words.to_bytes()).digest == words.digest
    bad = [b"", b"\xc0", json.dumps([1]).encode(), msgspec.msgpack.encode([[b"a"], [["x", 5]]])]
    for data in [*bad, msgspec.msgpack.encode([[b"a" * 2000], []])]:
        with pytest.raises(RemoteProtocolError):
            Vocabulary.from_bytes(data)


def test_tables_of_former_llms_do_not_pile_up(bundle: Path, tmp_path: Path) -> None:
    for n in range(MOST_TABLES + 3):
        (tmp_path / f"mined-{n}.npy").write_bytes(b"old")
    teacher = large(whole=False)
    learned(
        task(teacher, small(bundle, whole=False).adapter.factors(), whole=False), bundle, tmp_path
    )
    assert len(list(tmp_path.glob("mined-*.npy"))) == MOST_TABLES
    assert list(tmp_path.glob(f"mined-{teacher.words.digest[:24]}-*.npy"))
