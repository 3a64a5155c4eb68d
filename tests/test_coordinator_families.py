"""Families of different models and tokenizers in one run of CrossLM; how its texts are dealt."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from fleet_of_four import HELD_OUT, SPEC, Device, Log, drive
from learning_world import TASK, examples, folder, model, tokenizer
from msgspec.structs import replace
from tokenizers import Tokenizer

from coordinator.algorithms.crosslm import CrossLMConfig, asked, crosslm
from coordinator.algorithms.fedavg import FedAvgConfig, fedavg
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.families import Families, Family
from coordinator.gate import Gate
from coordinator.llm import Llm, Update, Written
from coordinator.programs import Commit, Note, Publish, Reply, Tell, Withdraw
from coordinator.sampling import Sampler, Way
from coordinator.twin import Twin
from edge_sdk.errors import ConfigError
from edge_sdk.train.lora import Adapter, LoraSpec
from edge_sdk.train.text_task import Sequences, TaskReader
from edge_sdk.wire.messages import ModelReport, OfferData, Scores

SMALL = LoraSpec(rank=2, alpha=4.0, targets=("q_proj", "o_proj"))
CFG = CrossLMConfig(
    rounds=2,
    samples=24,
    tau=0.0,
    min_texts=3,
    distil_steps=3,
    training=LocalTraining(steps=5, lr=2e-2, batch=8),
    update=Update(steps=3, lr=1e-2, batch=8),
)
PUBLIC = [text for text, _ in examples(40, seed=55)]
COHORTS = {"large": ("dev-a", "dev-b"), "small": ("dev-c",)}


def other_tokenizer() -> Tokenizer:
    """The same words under other ids."""
    held = json.loads(tokenizer().to_str())
    vocab = held["model"]["vocab"]
    held["model"]["vocab"] = {word: len(vocab) - 1 - i for word, i in vocab.items()}
    return Tokenizer.from_str(json.dumps(held))


def reader_of(family: str) -> TaskReader:
    return TaskReader(TASK, tokenizer() if family == "large" else other_tokenizer(), max_tokens=32)


def model_of(family: str):
    return model() if family == "large" else model(width=16, layers=1, seed=5)


def devices():
    found = {}
    for family, spec in (("large", SPEC), ("small", SMALL)):
        for i, name in enumerate(COHORTS[family]):
            adapter = Adapter(model_of(family), spec)
            found[name] = Device(name, adapter, reader_of(family), examples(60, seed=i))
    return found


class World:
    """Two families that share nothing but the task."""

    def __init__(self, home):
        torch.set_num_threads(1)
        llm_spec = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
        self.llm = Llm(home, TASK, llm_spec, seed=0, dtype=torch.float32)
        self.families = [
            Family(
                Twin(name, model_of(name), reader_of(name), spec, seed=7),
                AdapterExchange(name, Adapter(model_of(name), spec).layout, spec, seed=7),
                COHORTS[name],
                f"{name}-1",
                lambda release, _: release,
            )
            for name, spec in (("small", SMALL), ("large", SPEC))
        ]
        self.log = Log()

    def program(self, cfg=CFG, **how):
        return crosslm(self.llm, self.families, cfg, public_texts=PUBLIC, seed=3, **how)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("families") / "llm", seed=4)


def test_families_of_other_shape_and_tokenizer_learn_in_one_run(home):
    world, fleet = World(home), devices()
    starts = {f.name: f.exchange.factors for f in world.families}

    drive(world.program(), fleet, world.log)

    released = [(p.family, p.release, p.base) for p in world.log.of(Publish)]
    assert released[:2] == [
        ("large", "large-1-crosslm-1", "large-1"),
        ("small", "small-1-crosslm-1", "small-1"),
    ]
    for family in world.families:
        moved = family.exchange.factors
        assert any(not np.array_equal(moved[k], starts[family.name][k]) for k in moved)
        assert set(family.exchange.replicas) == set(COHORTS[family.name])
    sets = {tuple(fleet[name].synthetic.texts) for name in fleet}
    assert len(sets) == 1  # the same S for all
    assert {d for p in world.log.of(Publish)[:2] for d, *_ in p.lineage["updates"]} == set(fleet)


def test_fedavg_averages_each_family_by_itself_in_rounds_they_share(home):
    world, fleet = World(home), devices()
    cfg = FedAvgConfig(rounds=2, training=CFG.training, learn_codec=False)

    commit = drive(fedavg(world.families, cfg), fleet, world.log, until_commit=0)
    again = World(home)
    drive(fedavg(again.families, cfg, resume=commit), fleet, again.log)

    released = [(p.family, p.release) for p in (*world.log.of(Publish), *again.log.of(Publish))]
    assert released == [
        (name, f"{name}-1-fedavg-{i}") for i in (1, 2) for name in ("large", "small")
    ]
    for family in again.families:
        assert set(family.exchange.replicas) == set(COHORTS[family.name])
        assert all(np.array_equal(family.twin.factors[k], v)
                   for k, v in family.exchange.factors.items())  # fmt: skip
    assert [note.values["devices"] for note in again.log.of(Note)] == [3]


def test_every_replica_has_one_vote_whatever_its_family(home):
    world, fleet = World(home), devices()
    drive(world.program(dataclasses.replace(CFG, rounds=1)), fleet, world.log)
    texts = [text for text, _ in HELD_OUT[:5]]
    families = Families(world.families)
    by_name = {family.name: family.twin.jury(texts) for family in families.all}

    mixed = families.jury(texts)

    assert np.allclose(mixed, (2 * by_name["large"] + by_name["small"]) / 3, atol=1e-6)


def test_a_resumed_run_of_two_families_is_the_uninterrupted_one(home):
    cfg = dataclasses.replace(CFG, more_temperatures=(1.3,), frozen_writer=True)
    whole, fleet = World(home), devices()
    drive(whole.program(cfg), fleet, whole.log)

    part, fleet = World(home), devices()
    commit = drive(part.program(cfg), fleet, part.log, until_commit=0)
    again = World(home)
    drive(again.program(cfg, resume=Commit(commit.step, dict(commit.state))), fleet, again.log)

    assert whole.log.of(Commit)[-1].state == again.log.of(Commit)[-1].state


def test_a_round_bad_for_one_family_is_taken_back_for_all(home):
    """The small family's device finds its second release useless; the large one's go as well."""
    world, fleet = World(home), devices()
    for family in world.families:
        family.gate = Gate(max_drop=0.05)
    answer = fleet["dev-c"].answer

    def worse(message):
        found = answer(message)
        if isinstance(found, ModelReport):
            good = not found.release.endswith("-2")
            return replace(found, accuracy=0.9 if good else 0.0, examples=400)
        return found

    fleet["dev-c"].answer = worse
    for name in COHORTS["large"]:
        fleet[name].answer = steady(fleet[name].answer)

    drive(world.program(), fleet, world.log)

    back = [(w.family, w.release, w.instead) for w in world.log.of(Withdraw)]
    assert back == [
        ("small", "small-1-crosslm-2", "small-1-crosslm-1"),
        ("large", "large-1-crosslm-2", "large-1-crosslm-1"),
    ]
    first, last = world.log.of(Commit)
    assert last.state["outcome"] == b"discarded"
    assert all(last.state[k] == first.state[k] for k in ("llm", "pool", "kept/large"))
    assert "rolled_back" in world.log.of(Note)[-1].values
    assert isinstance(world.log.of(Tell)[-1].message, OfferData)


def steady(answer):
    def same(message):
        found = answer(message)
        if isinstance(found, ModelReport):
            return replace(found, accuracy=0.8, examples=400)
        return found

    return same


def test_scores_of_the_wrong_number_are_refused_with_the_number(home):
    world, fleet = World(home), devices()
    run = world.program(dataclasses.replace(CFG, rounds=1, score_on_devices=True))
    ask = run.send(None)
    replies = tuple(Reply(name, fleet[name].answer(ask.message(name))) for name in ask.to)
    score = run.send(replies)

    assert score.message("dev-a").release == "large-1"
    assert score.message("dev-c").release == "small-1"
    with pytest.raises(Exception, match=r"1 scores came for \d+ texts"):
        score.check("dev-a", Scores("score-0", (0.5,)))


def test_a_text_of_nothing_is_scored_nothing_and_sent_to_nobody(home):
    world = World(home)
    written = Written(["my cat", " ", "red dog"], ["sum", "list", "story"], Sequences([], []))
    run = asked(Families(world.families), 0, written, 1.0)

    request = next(run)
    assert request.message("dev-c").texts == ("my cat", "red dog")
    with pytest.raises(StopIteration) as end:
        run.send(tuple(Reply(name, Scores("score-0", (0.5, 1.0))) for name in request.to))

    assert end.value.value.tolist() == [0.5, 0.0, 1.0]


def test_families_that_cannot_run_together_are_refused(home):
    large, small = sorted(World(home).families, key=lambda family: family.name)

    with pytest.raises(ConfigError, match="two families"):
        Families([large, dataclasses.replace(small, cohort=("dev-a",))])
    with pytest.raises(ConfigError, match="different names"):
        Families([large, dataclasses.replace(large, cohort=("dev-c",))])
    with pytest.raises(ConfigError, match="different names"):
        Families([])


def test_texts_go_to_the_way_that_was_of_use():
    sampler = Sampler([Way("llm", 0.7), Way("llm", 1.5)], ("a", "b"))
    assert sampler.divide(9) == [5, 4]

    for label in ("a", "b"):
        sampler.learn([0] * 40, [label] * 40, [True] * 20 + [False] * 20)
        sampler.learn([1] * 40, [label] * 40, [True] * 1 + [False] * 39)

    assert sampler.divide(96) == [96, 0]


def test_a_way_that_alone_serves_a_label_keeps_its_share():
    sampler = Sampler([Way("llm", 0.7), Way("start", 0.7)], ("a", "b"))
    sampler.learn([0] * 80, ["a"] * 40 + ["b"] * 40, [True] * 20 + [False] * 60)
    sampler.learn([1] * 80, ["a"] * 40 + ["b"] * 40, [False] * 60 + [True] * 20)

    first, second = sampler.divide(96)

    assert min(first, second) >= 24
    assert first + second == 96


def test_counts_survive_and_counts_of_other_ways_are_not_taken():
    sampler = Sampler([Way(), Way("start")], ("a", "b"))
    sampler.learn([0, 1], ["a", "b"], [True, False])
    same, other = Sampler([Way(), Way("start")], ("a", "b")), Sampler([Way()], ("a", "b"))

    same.restore(sampler.to_bytes())
    other.restore(sampler.to_bytes())

    assert same.good.tolist() == [[1, 0], [0, 0]]
    assert same.tried.tolist() == [[1, 0], [0, 1]]
    assert other.tried.sum() == 0
