"""FedMKT's lines 8 and 9 on the devices: the same end as at the coordinator, in every setting."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from mkt_world import CFG, UNSEEN, World, devices, drive, home_of

from compression.codec import Compressor, FeedbackState
from compression.formats import words
from coordinator.abilities import Known
from coordinator.aggregate import slots
from coordinator.programs import Ask, Commit, Note
from edge_sdk.algorithms.vocabulary import Vocabulary
from edge_sdk.errors import QuorumMissed, RemoteProtocolError
from edge_sdk.train.lora import Factors
from edge_sdk.wire.messages import AdapterUpdate, OfferModel, TeachAdapter, TrainAdapter, encode

ON_DEVICES = replace(CFG, teach_on_devices=True)
EXACT = replace(ON_DEVICES, learn_codec=False, training=replace(CFG.training, ratio=0.0))
"""With `exact`, nothing is lost in coding."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return home_of(tmp_path_factory.mktemp("lessons") / "llm")


def exact(world: World) -> World:
    for family in world.families:
        family.exchange.use_codec(Compressor.identity(family.exchange.codec.layout))
    return world


def products(factors: Factors) -> dict[str, np.ndarray]:
    """B·A of every layer: what a model does, however its two factors share it."""
    return {s: factors[s + ".lora_B"] @ factors[s + ".lora_A"] for s in slots(factors)}


def apart(a: Factors, b: Factors) -> float:
    """Relative distance of two adapters' products."""
    one, other = products(a), products(b)
    far = sum(float(np.sum((one[s] - other[s]) ** 2)) for s in one)
    return float(np.sqrt(far / sum(float(np.sum(other[s] ** 2)) for s in other)))


def told(world: World) -> dict[str, object]:
    """What was told of the first round."""
    return next(note.values for note in world.log.of(Note) if "round" in note.values)


def kinds(world: World) -> list[str]:
    return [type(ask.message(ask.to[0])).__name__ for ask in world.log.of(Ask)]


def test_every_device_learns_what_the_coordinator_would_have_taught_its_family(home: Path) -> None:
    """Heterogeneous families of two; one round each way from the same updates."""
    here, fleet = World(home), devices()
    drive(here.program(replace(CFG, rounds=1)), fleet, here.log)
    there, fleet = World(home), devices()
    drive(there.program(replace(ON_DEVICES, rounds=1)), fleet, there.log)

    assert kinds(there)[:3] == ["TrainAdapter", "TopLogits", "TeachAdapter"]
    note = told(there)
    assert (note["lessons_words"], note["lessons_pieces"]) == (2, 2)
    assert not any(key.startswith("taught_") for key in note)  # how many texts stays with them
    for family in here.families:
        for name in family.cohort:
            wanted = family.exchange.factors
            assert all(np.allclose(fleet[name].taught[k], wanted[k], atol=2e-3) for k in wanted)


@pytest.mark.parametrize("whole", [False, True], ids=["labels", "whole texts"])
def test_one_to_one_the_run_ends_the_same(home: Path, whole: bool) -> None:
    alone = {"pieces": ("dev-c",)}
    ends = []
    for cfg in (replace(EXACT, teach_on_devices=False), EXACT):
        world, fleet = exact(World(home, alone)), devices(families=alone)
        drive(world.program(replace(cfg, rounds=1, whole=whole)), fleet, world.log)
        ends.append(world.families[0].exchange.factors)

    start = World(home, alone).families[0].exchange.factors
    assert all(np.any(ends[0][k] != start[k]) for k in start if k.endswith("lora_B"))
    assert apart(ends[1], ends[0]) < 2e-3  # float16


def test_a_homogeneous_group_is_averaged_before_and_after_its_lesson(home: Path) -> None:
    group = {"words": ("dev-a", "dev-b", "dev-e")}
    world, fleet = exact(World(home, group)), devices(families=group)

    drive(world.program(replace(EXACT, rounds=1)), fleet, world.log)

    (family,) = world.families
    mean = [products(fleet[name].taught) for name in group["words"]]
    found = products(family.exchange.factors)
    for slot in found:
        wanted = np.mean([one[slot] for one in mean], axis=0)
        assert np.linalg.norm(found[slot] - wanted) < 0.01 * np.linalg.norm(wanted)
    started = [fleet[name].lessons[0].adapter for name in group["words"]]
    assert len(set(started)) == 1  # FedAvg's factors
    assert told(world)["lessons_words"] == 3


def test_llm_to_slm_alone_asks_for_no_rows(home: Path) -> None:
    world, fleet = World(home), devices()
    before = world.llm.state()

    drive(world.program(replace(ON_DEVICES, rounds=1, teach_llm=False)), fleet, world.log)

    assert kinds(world)[:2] == ["TrainAdapter", "TeachAdapter"]
    assert all(np.array_equal(before[k], v) for k, v in world.llm.state().items())


def test_the_vocabulary_travels_once_and_again_to_who_did_not_answer(home: Path) -> None:
    world, fleet = World(home), devices()
    rounds = iter(range(9))

    def arrival(replies: list) -> list:  # type: ignore[type-arg]
        lesson = bool(fleet["dev-a"].__dict__.get("lessons"))
        first = lesson and len(fleet["dev-a"].lessons) == 1 and next(rounds) == 0
        return [r for r in replies if not (first and r.device == "dev-d")]

    cfg = replace(ON_DEVICES, rounds=3, teach_llm=False)
    drive(world.program(cfg), fleet, world.log, arrival=arrival)

    sent = {name: [bool(task.words) for task in fleet[name].lessons] for name in fleet}
    assert sent["dev-a"] == [True, False, False]
    assert sent["dev-d"] == [True, True, False]
    vocabulary = Vocabulary.from_bytes(fleet["dev-a"].lessons[0].words)
    assert bytes.fromhex(vocabulary.digest) == fleet["dev-c"].lessons[2].words_id
    assert vocabulary == Vocabulary.of(world.llm.reader.tokenizer)


def test_an_older_device_is_taught_in_the_plain_codec_that_it_reads(home: Path) -> None:
    group = {"words": ("dev-a", "dev-b")}
    world, fleet = World(home, group), devices(families=group)
    exchange = world.families[0].exchange
    plain, rng = exchange.codec, np.random.default_rng(1)
    past = {key: rng.normal(size=value.shape) for key, value in exchange.factors.items()}
    exchange.use_codec(plain.followed([plain.encode(past, FeedbackState(), 0).data]))
    exchange.about = lambda device, _round: Known(frozenset(words() if device == "dev-a" else ()))

    drive(world.program(replace(ON_DEVICES, rounds=2, learn_codec=False)), fleet, world.log)

    assert exchange.codec.format == 2
    for name, codec in (("dev-a", exchange.codec), ("dev-b", plain)):
        assert [task.codec_id for task in fleet[name].lessons] == [codec.codec_id] * 2
        assert not any(task.codec for task in fleet[name].lessons)  # each trained with it before
    assert told(world)["lessons_words"] == 2


def test_a_codec_that_came_with_a_lesson_is_not_sent_again(home: Path) -> None:
    world, fleet = World(home), devices()
    answer, seen = fleet["dev-a"].answer, []
    fleet["dev-a"].answer = lambda task: (seen.append(task), answer(task))[1]

    drive(world.program(replace(ON_DEVICES, rounds=2, teach_llm=False)), fleet, world.log)

    lesson = next(task for task in seen if isinstance(task, TeachAdapter))
    training = next(task for task in seen[seen.index(lesson) :] if isinstance(task, TrainAdapter))
    assert lesson.codec
    assert (training.codec_id, training.codec) == (lesson.codec_id, b"")


def test_the_traffic_of_a_round_counts_its_tasks_lessons_and_offers(home: Path) -> None:
    world, fleet = World(home), devices()
    down, up = [], []

    def listening(answer):  # type: ignore[no-untyped-def]
        def heard(task):  # type: ignore[no-untyped-def]
            reply = answer(task)
            down.append(task)
            up.append(reply)
            return reply

        return heard

    for device in fleet.values():
        device.answer = listening(device.answer)

    drive(world.program(replace(ON_DEVICES, rounds=1, teach_llm=False)), fleet, world.log)

    assert {type(task) for task in down} == {TrainAdapter, TeachAdapter, OfferModel}
    note = told(world)
    assert note["bytes_down"] == sum(len(encode(task)) for task in down)
    codes = [reply.codes for reply in up if isinstance(reply, AdapterUpdate)]
    assert len(codes) == 2 * len(fleet)
    assert note["bytes_up"] == sum(map(len, codes))


def test_a_family_without_a_lesson_is_taught_here(home: Path) -> None:
    world, fleet = World(home), devices()

    def arrival(replies: list) -> list:  # type: ignore[type-arg]
        lesson = world.log and isinstance(world.log[-1], Ask)
        asked = world.log[-1].message("dev-a") if lesson else None
        return [r for r in replies if not isinstance(asked, TeachAdapter) or r.device == "dev-a"]

    drive(world.program(replace(ON_DEVICES, rounds=1)), fleet, world.log, arrival=arrival)

    note = told(world)
    assert note["lessons_words"] == 1
    assert "lessons_pieces" not in note
    assert note["taught_pieces"] > 0


def test_nobody_answers_a_lesson_and_the_round_is_that_of_the_coordinator(home: Path) -> None:
    ends = []
    for cfg in (CFG, ON_DEVICES):
        world, fleet = World(home), devices()
        program = world.program(replace(cfg, rounds=1))
        request = next(program)
        while not isinstance(request, Commit):
            task = request.message(request.to[0]) if isinstance(request, Ask) else None
            if isinstance(task, TeachAdapter):
                request = program.throw(QuorumMissed("nobody"))
                continue
            answer = drive(iter_of(request, keep := []), fleet, world.log) or keep
            request = program.send(answer[0] if answer else None)
        ends.append([family.exchange.factors for family in world.families])

    for one, other in zip(*ends, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)


def iter_of(request: object, keep: list) -> Iterator[object]:  # type: ignore[type-arg]
    """A program of one request that keeps its answer."""
    keep.append((yield request))


def test_a_resumed_run_gives_the_same_lessons(home: Path) -> None:
    whole, fleet = World(home), devices()
    drive(whole.program(ON_DEVICES, held_out=UNSEEN), fleet, whole.log)

    part, fleet = World(home), devices()
    commit = drive(part.program(ON_DEVICES, held_out=UNSEEN), fleet, part.log, until_commit=0)
    again = World(home)
    resume = Commit(commit.step, dict(commit.state))
    drive(again.program(ON_DEVICES, held_out=UNSEEN, resume=resume), fleet, again.log)

    for one, other in zip(whole.families, again.families, strict=True):
        a, b = one.exchange.factors, other.exchange.factors
        assert all(np.array_equal(a[key], b[key]) for key in a)
    assert not fleet["dev-a"].lessons[1].words


BAD = {
    "another codec": ({"codec_id": "other"}, "never sent"),
    "rubbish": ({"codes": b"rubbish"}, "codes"),
    "nothing": ({"codes": b""}, "codes"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_an_answer_that_cannot_be_used_is_refused(home: Path, case: str) -> None:
    world, fleet = World(home), devices()
    program = world.program(replace(ON_DEVICES, rounds=1, teach_llm=False))
    training = next(program)
    answers = drive(iter_of(training, keep := []), fleet, world.log) or keep
    lesson = program.send(answers[0])
    assert isinstance(lesson, Ask)
    honest = fleet["dev-a"].answer(lesson.message("dev-a"))
    assert isinstance(honest, AdapterUpdate)
    assert lesson.check is not None
    lesson.check("dev-a", honest)

    changes, said = BAD[case]
    with pytest.raises(Exception, match=said):
        lesson.check("dev-a", msgspec.structs.replace(honest, **changes))


def test_a_change_beyond_the_bound_is_refused(home: Path) -> None:
    world, fleet = World(home), devices()
    world.families[1].exchange.rule = replace(world.families[1].exchange.rule, max_norm=1e-9)
    program = world.program(replace(ON_DEVICES, rounds=1, teach_llm=False))
    request = next(program)
    request = replace(request, check=None)
    answers = drive(iter_of(request, keep := []), fleet, world.log) or keep
    lesson = program.send(answers[0])

    name = world.families[1].cohort[0]
    with pytest.raises(RemoteProtocolError, match="its lesson is left out"):
        lesson.check(name, fleet[name].answer(lesson.message(name)))
