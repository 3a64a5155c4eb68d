"""FedAvg as a program: rounds by plain send, resume, lost quorum, order of arrival, bad updates."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from fleet_of_four import COHORT, SPEC, Log, drive, fleet
from learning_world import TASK, model, tokenizer

from compression.errors import CodecError
from coordinator.algorithms.fedavg import FedAvgConfig, fedavg
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.families import Family
from coordinator.programs import Ask, Commit, Note, Publish, Release, Reply
from coordinator.twin import Twin
from edge_sdk.errors import QuorumMissed, RemoteProtocolError
from edge_sdk.train.lora import Adapter, from_bytes
from edge_sdk.train.text_task import TaskReader
from edge_sdk.wire.messages import OfferModel, TrainAdapter

LAYOUT = Adapter(model(), SPEC).layout
CFG = FedAvgConfig(rounds=2, training=LocalTraining(steps=6, lr=2e-2, batch=8))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def exchange():
    return AdapterExchange("tiny", LAYOUT, SPEC, seed=7)


def program(state, tmp_path, *, cfg=CFG, resume=None):
    twin = Twin("tiny", model(), TaskReader(TASK, tokenizer(), max_tokens=32), SPEC, seed=7)
    family = Family(twin, state, COHORT, "base-1", lambda name, factors: tmp_path)
    return fedavg([family], cfg, resume=resume)


def train_asks(log):
    return [a for a in log.of(Ask) if isinstance(a.message(COHORT[0]), TrainAdapter)]


def test_rounds_train_publish_measure_and_commit(tmp_path):
    state, log = exchange(), Log()

    last = drive(program(state, tmp_path, cfg=replace(CFG, learn_codec=False)), fleet(), log)

    kinds = [type(request).__name__ for request in log]
    assert kinds == ["Ask", "Publish", "Ask", "Note", "Commit"] * 2
    assert last.step == 1
    assert [p.release for p in log.of(Publish)] == [f"base-1-fedavg-{i}" for i in (1, 2)]
    assert all(p.base == "base-1" for p in log.of(Publish))
    assert log.of(Note)[0].values["devices"] == 3
    assert isinstance(log.of(Ask)[1].message("dev-a"), OfferModel)


def test_a_codec_travels_once_and_one_that_is_no_better_than_the_plain_one_is_dropped(tmp_path):
    log, devices, state = Log(), fleet(), exchange()
    sent = []
    for name in COHORT:
        original = devices[name].train
        devices[name].train = lambda task, f=original: sent.append(task) or f(task)

    drive(program(state, tmp_path, cfg=replace(CFG, rounds=3)), devices, log)

    ids = [task.codec_id for task in sent]
    assert len(set(ids[:3])) == 1
    assert len(set(ids[3:6])) == 1
    assert ids[0] != ids[3]
    assert all(task.codec for task in sent[:6])
    assert ids[6:] == ids[:3]
    assert not any(task.codec for task in sent[6:])
    assert [n.values["codec"] for n in log.of(Note) if "codec" in n.values] == ["dropped"]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, devices = exchange(), fleet()
    drive(program(whole, tmp_path), devices, Log())

    devices = fleet()
    commit = drive(program(exchange(), tmp_path), devices, Log(), until_commit=0)
    stored = Commit(commit.step, dict(commit.state))
    again, log = exchange(), Log()
    drive(program(again, tmp_path, resume=stored), devices, log)

    assert len(log.of(Commit)) == 1
    assert all(np.array_equal(again.factors[k], v) for k, v in whole.factors.items())


def test_the_order_of_arrival_does_not_matter(tmp_path):
    states = []
    for arrival in (lambda r: r, lambda r: r[::-1]):
        states.append(exchange())
        drive(program(states[-1], tmp_path), fleet(), Log(), arrival=arrival)

    assert all(np.array_equal(states[1].factors[k], v) for k, v in states[0].factors.items())


def test_a_missed_quorum_is_asked_again_in_the_same_words_then_raised(tmp_path):
    run = program(exchange(), tmp_path)
    first = next(run)

    note = run.throw(QuorumMissed("1 of 3"))
    second = run.send(None)

    assert isinstance(note, Note)
    assert second is first
    with pytest.raises(QuorumMissed):
        run.throw(QuorumMissed("1 of 3"))


def test_a_missed_report_costs_the_number_not_the_round(tmp_path):
    devices, state = fleet(), exchange()
    run = program(state, tmp_path)
    ask = next(run)
    publish = run.send(tuple(Reply(n, devices[n].answer(ask.message(n))) for n in COHORT))
    assert isinstance(publish, Publish)
    run.send(Release("tiny", publish.release, (), {}))

    run.throw(QuorumMissed("0 of 3"))
    note = run.send(None)

    assert note.values["accuracy"] is None
    assert isinstance(run.send(None), Commit)


def test_a_late_update_counts_relative_to_what_it_started_from(tmp_path):
    devices, state = fleet(), exchange()
    run = program(state, tmp_path)
    ask = next(run)
    first_task = {n: devices[n].answer(ask.message(n)) for n in COHORT}
    publish = run.send((Reply("dev-a", first_task["dev-a"]), Reply("dev-b", first_task["dev-b"])))
    run.send(Release("tiny", publish.release, (), {}))
    run.send(())
    run.send(None)
    ask = run.send(None)
    assert isinstance(ask, Ask)
    ask.check("dev-c", first_task["dev-c"])
    before = state.factors
    fresh = Reply("dev-a", devices["dev-a"].answer(ask.message("dev-a")))
    run.send((fresh, Reply("dev-c", first_task["dev-c"], staleness=1)))

    assert any(not np.array_equal(before[k], state.factors[k]) for k in before)
    start = from_bytes(ask.message("dev-a").adapter)
    assert all(np.array_equal(start[k], before[k]) for k in before)
    assert set(state.replicas) == {"dev-a", "dev-b", "dev-c"}


def test_bad_updates_are_refused_before_they_count(tmp_path):
    devices, state = fleet(), exchange()
    ask = next(program(state, tmp_path))
    good = devices["dev-a"].answer(ask.message("dev-a"))

    ask.check("dev-a", good)

    for change, error in (
        ({"codec_id": "other"}, RemoteProtocolError),
        ({"round": 5}, RemoteProtocolError),
        ({"codes": good.codes[:-3]}, CodecError),
        ({"codes": b""}, CodecError),
    ):
        with pytest.raises(error):
            ask.check("dev-a", msgspec.structs.replace(good, **change))
