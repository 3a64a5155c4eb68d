"""FedMKT as a program: a round step by step, two tokenizers, resume, bad rows, both directions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mkt_world import CFG, FAMILIES, PUBLIC, UNSEEN, Log, World, devices, drive, home_of

from coordinator.bank import Bank, Teacher
from coordinator.families import Families
from coordinator.gate import Gate
from coordinator.peers import combined
from coordinator.programs import Ask, Commit, Note, Publish
from coordinator.school import School
from coordinator.yardstick import Yardstick
from edge_sdk.algorithms.alignment import dtw
from edge_sdk.algorithms.logit_rows import LogitTable, Places
from edge_sdk.algorithms.selection import bits_per_byte, dual_min_ce
from edge_sdk.algorithms.vocabulary import NONE
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.train.teaching import Lesson, target_bytes
from edge_sdk.wire.messages import LogitRows, TopLogits, TrainAdapter

Classroom = tuple[World, Families, School, Bank]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return home_of(tmp_path_factory.mktemp("fedmkt") / "llm")


def asks(log: Log) -> list[str]:
    return [type(ask.message(ask.to[0])).__name__ for ask in log.of(Ask)]


def rounds(log: Log) -> list[dict[str, Any]]:
    """What was told of each round; a codec may be told of in between."""
    return [note.values for note in log.of(Note) if "round" in note.values]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in a)


def test_a_run_of_two_families_asks_teaches_publishes_and_commits(home: Path) -> None:
    world, fleet = World(home), devices()

    last = drive(world.program(held_out=UNSEEN), fleet, world.log)

    told = [r for r in world.log if not isinstance(r, Note) or "round" in r.values]
    kinds = [type(request).__name__ for request in told]
    assert kinds == ["Ask", "Ask", *["Publish", "Ask"] * 2, "Note", "Commit"] * 2
    assert asks(world.log) == ["TrainAdapter", "TopLogits", "OfferModel", "OfferModel"] * 2
    rows = world.log.of(Ask)[1]
    assert rows.message("dev-a").family == "words"
    assert rows.message("dev-c").family == "pieces"
    note = rounds(world.log)[0]
    assert sum(note["by"].values()) == note["llm_taught"] > 0
    assert note["taught_pieces"] > 0
    assert {"bits_llm", "bits_words", "bits_pieces", "accuracy"} <= set(note)
    first = world.log.of(Publish)[0]
    assert (first.family, first.release, first.base) == ("pieces", "base-fedmkt-1", "base")
    assert first.lineage["rows"] == dict.fromkeys(sorted(fleet), 0)
    assert first.lineage["llm"] == note["by"]
    assert last.state["outcome"] == b"kept"


def test_no_request_and_no_state_carries_a_devices_text(home: Path) -> None:
    world, fleet = World(home), devices()
    private = {text for device in fleet.values() for text, _ in device.examples}
    private -= {text for text, _ in PUBLIC}

    drive(world.program(replace(CFG, rounds=1)), fleet, world.log)

    said = b"".join(b for commit in world.log.of(Commit) for b in commit.state.values())
    for ask in world.log.of(Ask):
        message = ask.message(ask.to[0])
        said += b"".join(t.encode() for t in getattr(message, "texts", ()))
    assert not any(len(text) > 20 and text.encode() in said for text in private)


def test_a_resumed_run_is_the_uninterrupted_one(home: Path) -> None:
    whole, fleet = World(home), devices()
    drive(whole.program(held_out=UNSEEN), fleet, whole.log)

    part, fleet = World(home), devices()
    commit = drive(part.program(held_out=UNSEEN), fleet, part.log, until_commit=0)
    again = World(home)
    resume = Commit(commit.step, dict(commit.state))
    drive(again.program(held_out=UNSEEN, resume=resume), fleet, again.log)

    assert same(whole.llm.state(), again.llm.state())
    for one, other in zip(whole.families, again.families, strict=True):
        assert same(one.exchange.factors, other.exchange.factors)
    ends = [world.log.of(Commit)[-1].state for world in (whole, again)]
    assert ends[0]["bank"] == ends[1]["bank"]
    assert ends[0]["yardstick"] == ends[1]["yardstick"]


def test_each_direction_alone(home: Path) -> None:
    world, fleet = World(home), devices()
    start = world.llm.state()
    drive(world.program(replace(CFG, rounds=1, teach_llm=False)), fleet, world.log)
    assert "TopLogits" not in asks(world.log)  # LLM2SLM: nobody asks what nobody learns from
    assert same(start, world.llm.state())
    assert rounds(world.log)[0]["taught_words"] > 0

    world, fleet = World(home), devices()
    drive(world.program(replace(CFG, rounds=1, teach_slms=False)), fleet, world.log)
    assert "taught_words" not in rounds(world.log)[0]
    assert not same(start, world.llm.state())


def test_replicas_can_tell_instead_of_devices(home: Path) -> None:
    world, fleet = World(home), devices()
    drive(world.program(replace(CFG, rounds=1, ask_devices=False)), fleet, world.log)

    assert "TopLogits" not in asks(world.log)
    assert rounds(world.log)[0]["llm_taught"] > 0


def test_one_family_of_one_device_and_whole_texts(home: Path) -> None:
    """One-to-one, every token of the public texts, aligned by bytes; in pieces of another cut."""
    alone = {"pieces": ("dev-c",)}
    world, fleet = World(home, alone), devices(families=alone)
    cfg = replace(CFG, rounds=1, whole=True, greedy=True)

    drive(world.program(cfg, held_out=UNSEEN), fleet, world.log)

    note = rounds(world.log)[0]
    assert note["by"] == {"dev-c": note["llm_taught"]}
    assert note["taught_pieces"] > 0


def test_a_family_that_is_silent_for_a_round_is_taught_all_the_same(home: Path) -> None:
    world, fleet = World(home), devices()

    def arrival(replies: list) -> list:  # type: ignore[type-arg]
        return [reply for reply in replies if reply.device in FAMILIES["words"]]

    last = drive(
        world.program(replace(CFG, need=2), held_out=UNSEEN), fleet, world.log, arrival=arrival
    )

    notes = rounds(world.log)
    assert [note["devices"] for note in notes] == [2, 2]
    assert set(notes[0]["by"]) == set(FAMILIES["words"])
    assert notes[0]["taught_pieces"] > 0
    assert last.state["outcome"] == b"kept"


def test_an_llm_that_got_worse_is_taken_back_and_the_families_go_on(home: Path) -> None:
    world, fleet = World(home), devices()
    start = world.llm.state()
    figures = iter([(0.9, 500), (0.4, 500)])  # before the run, and after the round
    gate = Gate(0.05, lambda _: next(figures))

    drive(world.program(replace(CFG, rounds=1), llm_gate=gate), fleet, world.log)

    note = rounds(world.log)[0]
    assert "accuracy fell" in note["llm_rolled_back"]
    assert all(np.allclose(start[key], value) for key, value in world.llm.state().items())
    assert "rolled_back" not in note


def test_a_family_that_got_worse_is_rolled_back_before_it_is_published(home: Path) -> None:
    world, fleet = World(home), devices()
    before = {f.name: f.exchange.factors for f in world.families}
    cfg = replace(CFG, rounds=1, teach_llm=False, max_rise=-0.9)  # to a tenth, or it is a fault

    last = drive(world.program(cfg, held_out=UNSEEN), fleet, world.log)

    assert "needs" in rounds(world.log)[0]["rolled_back"]
    assert not world.log.of(Publish)
    assert last.state["outcome"] == b"discarded"
    assert all(same(before[f.name], f.exchange.factors) for f in world.families)


def test_a_run_ends_when_nothing_gains_any_more(home: Path) -> None:
    world, fleet = World(home), devices()
    idle = Lesson(steps=0)
    still = replace(CFG.training, lr=1e-9)
    cfg = replace(CFG, rounds=5, patience=2, llm=idle, slm=idle, training=still)

    last = drive(world.program(cfg, held_out=UNSEEN), fleet, world.log)

    assert last.step == 1
    assert "no gain" in world.log.of(Note)[-1].values["stopped"]


# --- what devices tell ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classroom(home: Path) -> Classroom:
    world = World(home)
    fleet = Families(world.families)
    school = School(world.llm, fleet, PUBLIC, (), whole=False, align=dtw, cache=None)
    return world, fleet, school, Bank(fleet, school.small, kept=8, stale_rounds=2)


def told(classroom: Classroom, name: str) -> LogitRows:
    _, fleet, school, _ = classroom
    texts, labels = zip(*school.public, strict=True)
    task = TopLogits("rows-0", 0, fleet.of(name).name, "base", texts, labels, 8)
    return devices()[name].answer(task)


def test_rows_that_cannot_be_are_refused_with_the_reason(classroom: Classroom) -> None:
    bank = classroom[3]
    honest = told(classroom, "dev-a")
    bank.check("dev-a", honest)
    n, vocabulary = len(PUBLIC), len(classroom[2].small["words"].words)
    ids = np.frombuffer(honest.ids, "<u2").reshape(n, 8).copy()
    ids[3, 2] = vocabulary
    logps = np.frombuffer(honest.logps, "<f2").copy()
    logps[5] = np.nan
    for changes, said in (
        ({"places": bytes(32)}, "told of other texts"),
        ({"places": told(classroom, "dev-c").places}, "told of other texts"),
        ({"kept": 4}, "sent 4 entries a row, asked were 8"),
        ({"truth": honest.truth[:-4]}, "truth has 92 bytes"),
        ({"ids": ids.tobytes()}, f"token id {vocabulary} is outside the vocabulary"),
        ({"logps": logps.tobytes()}, "not finite"),
        ({"truth": bytes(4 * n)}, "the loss claimed"),
    ):
        with pytest.raises(RemoteProtocolError, match=said):
            bank.check("dev-a", msgspec.structs.replace(honest, **changes))


def test_the_bank_holds_the_newest_rows_for_some_rounds(classroom: Classroom) -> None:
    _, fleet, school, _ = classroom
    bank = Bank(fleet, school.small, kept=8, stale_rounds=2)
    table = school.small["words"].table(8)
    bank.put("dev-a", 1, table)
    bank.put("dev-b", 3, table)
    bank.put("dev-b", 2, school.small["words"].table(4))  # late, and older

    def names(step: int) -> dict[str, float]:
        return {one.device: one.weight for one in bank.teachers("words", step)}

    assert list(names(3)) == ["dev-a", "dev-b"]
    assert names(3)["dev-b"] == 1.0 > names(3)["dev-a"] > 0
    assert list(names(4)) == ["dev-b"]
    assert bank.teachers("pieces", 3) == []
    assert bank.teachers("words", 3)[1].table.kept == 8

    again = Bank(fleet, school.small, kept=8, stale_rounds=2)
    again.restore(bank.to_bytes())
    assert again.to_bytes() == bank.to_bytes()
    assert again.told() == {"dev-a": 1, "dev-b": 3}
    again.forget(["dev-a"])
    assert again.told() == {"dev-b": 3}


def test_an_old_teacher_has_to_be_better_than_a_new_one(classroom: Classroom) -> None:
    _, _, school, _ = classroom
    table = school.small["words"].table(8)
    old, new = Teacher("dev-a", table, 0.7), Teacher("dev-b", table, 1.0)
    sure = replace(table, truth=table.truth * np.float32(0.01))  # better on every text

    _, chosen, by = school.for_large({"words": [Teacher("dev-a", sure, 0.7), new], "pieces": []})
    assert chosen.all()
    assert by == {"dev-a": len(PUBLIC), "dev-b": 0}

    _, chosen, by = school.for_large({"words": [old, new], "pieces": []})
    assert by == {"dev-a": 0, "dev-b": int(chosen.sum())}


# --- who teaches whom -----------------------------------------------------------------------------

LOSSES = st.floats(0.0, 50.0, width=32)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    hnp.arrays(np.float32, (5,), elements=LOSSES),
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.just(5)), elements=LOSSES),
)
def test_a_text_is_taught_exactly_when_a_teacher_is_better(
    own: np.ndarray, teachers: np.ndarray
) -> None:
    best = dual_min_ce(own, teachers)

    for i, teacher in enumerate(best.tolist()):
        least = min(teachers[:, i], default=np.inf)
        assert (teacher != NONE) == (least < own[i])
        assert teacher == NONE or teachers[teacher, i] == least


def test_tokenizers_compare_by_bytes_of_the_target(home: Path) -> None:
    """The same text costs each model its own number of tokens, and the same number of bytes."""
    world = World(home)
    readers = [world.llm.reader, *(family.twin.reader for family in world.families)]
    for whole in (False, True):
        sizes = [target_bytes(reader, PUBLIC, whole=whole).tolist() for reader in readers]
        assert sizes[0] == sizes[1] == sizes[2]
    assert target_bytes(readers[0], [("x", "sum")], whole=False).tolist() == [len(b" sum")]
    assert bits_per_byte(np.float32([np.log(2) * 8]), np.array([4])) == pytest.approx([2.0])


def test_each_text_comes_from_its_own_teacher() -> None:
    places = Places.of([[1, 2], [3], [4, 5]], [0, 0, 0])
    tables = [
        LogitTable(
            places,
            np.full(5, -v, np.float32),
            np.full((5, 2), v, np.int32),
            np.full((5, 2), -v, np.float16),
        )
        for v in (1, 2)
    ]

    mixed = combined(tables, np.array([1, NONE, 0]))

    assert mixed.ids[:, 0].tolist() == [2, 2, 1, 1, 1]
    assert mixed.truth.tolist() == [-2, -2, -1, -1, -1]


def test_a_yardstick_knows_the_best_and_when_to_stop() -> None:
    rise = Yardstick(0.1, patience=2)
    rise.keep({"a": 1.0, "b": None})
    assert rise.fault("a", 1.1) == ""
    assert "allowed is a rise of 10%" in rise.fault("a", 1.11)
    assert rise.fault("b", 9.0) == rise.fault("new", 9.0) == ""
    rise.keep({"a": 0.9999})  # less than a thousandth
    assert not rise.over
    again = Yardstick(0.1, patience=2)
    again.restore(rise.to_bytes())
    again.keep({"a": 1.05})
    assert again.over
    assert again.best == {"a": 0.9999}
    again.keep({"a": 0.5})
    assert not again.over


def test_a_task_of_training_reaches_each_family_in_its_own_shape(home: Path) -> None:
    world = World(home)
    ask = next(world.program())

    a, c = ask.message("dev-a"), ask.message("dev-c")
    assert isinstance(a, TrainAdapter)
    assert (a.family, c.family) == ("words", "pieces")
    assert a.adapter != c.adapter
