"""CrossLM as a program: one round step by step, S, the ablation, resume, and both sides gaining."""

import dataclasses

import numpy as np
import pytest
import torch
from fleet_of_four import COHORT, HELD_OUT, SPEC, Log, drive, fleet
from learning_world import TASK, examples, folder, model, tokenizer
from msgspec.structs import replace

from coordinator.algorithms.crosslm import CrossLMConfig, crosslm
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.families import Family
from coordinator.llm import Llm, Update, Written
from coordinator.programs import Ask, Commit, Note, Publish, Tell
from coordinator.synthetic import Pool, uniform_labels, worth_keeping
from coordinator.twin import Twin
from edge_sdk.errors import QuorumMissed
from edge_sdk.train.lora import LoraSpec
from edge_sdk.train.text_task import Sequences, TaskReader
from edge_sdk.wire.messages import ModelReport, OfferData, Score

CFG = CrossLMConfig(
    rounds=2,
    samples=24,
    tau=0.4,
    distil_steps=3,
    min_texts=3,
    distil_lr=5e-3,
    training=LocalTraining(steps=5, lr=2e-2, batch=8),
    update=Update(steps=3, lr=1e-2, tau=0.4, batch=8),
)
PUBLIC = [text for text, _ in examples(60, seed=55)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    return folder(tmp_path_factory.mktemp("crosslm") / "llm", seed=4)


class World:
    """Everything a run needs, made anew."""

    def __init__(self, home):
        llm_spec = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
        self.llm = Llm(home, TASK, llm_spec, seed=0, dtype=torch.float32)
        reader = TaskReader(TASK, tokenizer(), max_tokens=32)
        self.twin = Twin("tiny", model(), reader, SPEC, seed=7)
        self.exchange = AdapterExchange("tiny", self.twin.layout, SPEC, seed=7)
        self.log = Log()

    def program(self, cfg=CFG, *, whole=None, **how):
        return crosslm(
            self.llm,
            [Family(self.twin, self.exchange, COHORT, "base-1", lambda *_: "adapter", whole)],
            cfg,
            seed=3,
            **how,
        )


def test_a_run_asks_tells_publishes_notes_and_commits(home):
    world, devices = World(home), fleet()
    cfg = dataclasses.replace(CFG, tau=0.0, learn_codec=False)

    last = drive(world.program(cfg, whole=lambda *_: "whole"), devices, world.log)

    kinds = [type(request).__name__ for request in world.log]
    assert kinds == ["Ask", "Tell", "Publish", "Ask", "Note", "Commit"] * 2
    first, final = world.log.of(Publish)
    assert (first.release, first.base, first.folder) == ("base-1-crosslm-1", "base-1", "adapter")
    assert (final.release, final.base, final.folder) == ("base-1-distilled", None, "whole")
    assert set(last.state) > {"exchange/tiny", "llm", "pool"}
    assert last.state["outcome"] == b"kept"
    assert devices["dev-a"].synthetic.version == 2
    assert {"score", "kept", "distinct_2", "loss_gen", "accuracy"} <= set(
        world.log.of(Note)[0].values
    )


def test_no_request_carries_a_devices_text(home):
    world, devices = World(home), fleet()
    private = {text for device in devices.values() for text, _ in device.examples}

    drive(world.program(), devices, world.log)

    for tell in world.log.of(Tell):
        assert isinstance(tell.message, OfferData)
    state = b"".join(b for commit in world.log.of(Commit) for b in commit.state.values())
    assert not any(len(t) > 20 and t.encode() in state for t in private)


def test_a_resumed_run_is_the_uninterrupted_one(home):
    whole, devices = World(home), fleet()
    drive(whole.program(), devices, whole.log)

    part, devices = World(home), fleet()
    commit = drive(part.program(), devices, part.log, until_commit=0)
    again = World(home)
    drive(again.program(resume=Commit(commit.step, dict(commit.state))), devices, again.log)

    def same(a, b):
        return all(np.array_equal(a[k], b[k]) for k in a)

    assert same(whole.exchange.factors, again.exchange.factors)
    assert same(whole.llm.state(), again.llm.state())
    assert whole.log.of(Commit)[-1].state["pool"] == again.log.of(Commit)[-1].state["pool"]


def test_a_run_without_gain_ends_and_one_that_gains_goes_on(home):
    for figures, rounds in (((0.5, 0.5, 0.5, 0.5), 3), ((0.5, 0.6, 0.7, 0.8), 4)):
        world, left = World(home), list(figures)
        fleet_ = fleet()
        for device in fleet_.values():
            device.answer = without_examples(device.answer)
        cfg = dataclasses.replace(CFG, rounds=4, patience=2)

        drive(
            world.program(cfg, measure=lambda left=left: {"llm_accuracy": left.pop(0)}),
            fleet_, world.log,
        )  # fmt: skip

        assert len(world.log.of(Commit)) == rounds
        stopped = world.log.of(Note)[-1].values.get("stopped")
        assert stopped == ("no gain in 2 rounds" if rounds == 3 else None)


def without_examples(answer):
    """Reports that count for nothing, so that only the coordinator's figure speaks."""

    def silent(message):
        found = answer(message)
        return replace(found, examples=0) if isinstance(found, ModelReport) else found

    return silent


def test_devices_can_score_themselves_and_silence_falls_back_to_the_twin(home):
    world, devices = World(home), fleet()
    cfg = dataclasses.replace(CFG, rounds=1, score_on_devices=True)

    drive(world.program(cfg), devices, world.log)

    asked = [a for a in world.log.of(Ask) if isinstance(a.message("dev-a"), Score)]
    assert len(asked) == 1
    assert len(asked[0].message("dev-a").texts) == CFG.samples


def test_a_missed_quorum_reaches_the_program_and_is_raised_at_the_end_of_patience(home):
    run = World(home).program(dataclasses.replace(CFG, retries=0))
    next(run)
    with pytest.raises(QuorumMissed):
        run.throw(QuorumMissed("2 of 3"))


def test_permuting_the_feedback_changes_what_the_llm_learns(home):
    states = []
    for permute in (False, True):
        world = World(home)
        cfg = dataclasses.replace(CFG, rounds=1, permute_feedback=permute)
        drive(world.program(cfg, public_texts=PUBLIC), fleet(), world.log)
        states.append(world.llm.state())
    assert any(not np.array_equal(states[0][k], states[1][k]) for k in states[0])


def test_small_and_large_model_both_gain(home):
    """The LLM sees no device's label; it learns from what the twins say of public text."""
    world, devices = World(home), fleet()
    texts, labels = zip(*HELD_OUT, strict=True)
    before = world.llm.accuracy(texts, labels), world.twin.accuracy(texts, labels)
    cfg = dataclasses.replace(
        CFG,
        training=LocalTraining(steps=30, lr=2e-2, batch=16),
        update=Update(steps=25, lr=2e-2, tau=0.4, reg=0.1),
    )

    drive(world.program(cfg, public_texts=PUBLIC), devices, world.log)

    after = world.llm.accuracy(texts, labels), world.twin.accuracy(texts, labels)
    assert after[0] > before[0] + 0.15
    assert after[1] > 0.8 > before[1]


def test_s_keeps_good_long_distinct_texts_that_do_not_name_their_label():
    texts = ["tell a red story", "once my big dog", "Once  my big dog", "go now", "my two cat dog"]
    written = Written(texts, ["story"] * 5, Sequences([[0, 1]] * 5, [1] * 5))

    rows = worth_keeping(TASK, written, np.array([0.9, 0.9, 0.9, 0.9, 0.1]), 0.5)

    assert rows == [1]


def test_the_pool_holds_each_text_once_and_the_best_when_full():
    pool = Pool()
    pool.add(["a b c", "d e f"], ["sum", "list"], [0.5, 0.9])
    pool.add(["A  b c", "g h i"], ["sum", "story"], [0.6, 0.7])
    pool.trim(2)

    assert pool.texts == ["d e f", "g h i"]
    assert pool.offer(3).weights == (0.9, 0.7)
    assert pool.offer(3).version == 3


def test_labels_are_uniform_and_seeded():
    drawn = uniform_labels(TASK, 32, np.random.default_rng(0))
    assert sorted(drawn.count(label) for label in TASK.labels) == [10, 11, 11]
    assert drawn == uniform_labels(TASK, 32, np.random.default_rng(0))


def test_a_handful_of_texts_is_not_distilled_on(home):
    world, devices = World(home), fleet()
    cfg = dataclasses.replace(CFG, rounds=1, min_texts=10_000)

    drive(world.program(cfg), devices, world.log)

    assert world.log.of(Note)[0].values["distil_loss"] == 0.0
    start = world.log.of(Commit)[0].state["exchange/tiny"]
    assert start == world.exchange.state()
