"""Refusals that say what is lacking: sent again at once with it, or excused; formats by device."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import msgspec
import pytest
from mkt_world import CFG, devices, home_of
from mkt_world import World as MktWorld
from test_coordinator_bad_answers import Fleet as Lessons

from coordinator.inbox import Waiting
from coordinator.programs import Ask, Commit, Program, Reply
from coordinator.quorum import Quorum
from coordinator.store import AskRow
from edge_sdk.errors import QuorumMissed
from edge_sdk.wire.messages import AnyMessage, ModelReport, Refused, TeachAdapter, TrainAdapter
from tests.coordinator_world import FakeDevice, train, until, update
from tests.test_coordinator_runner import BOTH, World

PATIENCE_S = 60.0
"""No test waits so long; a busy machine may."""
ROWS = [(1, "a"), (2, "b")]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def refusing(*lacks: str) -> object:
    """Refuses every task without a codec in it."""

    def behave(message: AnyMessage) -> list[AnyMessage]:
        if not isinstance(message, TrainAdapter):
            return []
        if message.codec:
            return [update(message)]
        return [Refused(message.task_id, "not here", lacks)]

    return behave


def asking(world: World, need: int, got: list[tuple[Reply, ...]], rounds: int = 1) -> None:
    def task(round_: int) -> object:
        def of(device: str) -> AnyMessage:
            lacks = world.coordinator.fleet.abilities.about(device, round_).lacks
            return train(round_, codec=b"codec" if "codec" in lacks else b"")

        return of

    def program(_: Commit | None) -> Program:
        for step in range(rounds):
            got.append((yield Ask(task(step), BOTH, need, PATIENCE_S)))  # type: ignore[arg-type]
            yield Commit(step, {})

    world.run(program)


def test_what_was_lacking_is_sent_at_once_in_the_same_round(world: World) -> None:
    world.devices["b"].behave = refusing("codec")
    got: list[tuple[Reply, ...]] = []

    asking(world, 2, got, rounds=2)

    assert [[reply.device for reply in replies] for replies in got] == [["a", "b"]] * 2
    assert [bool(task.codec) for task in world.tasks("b", TrainAdapter)] == [False, True] * 2
    assert not any(task.codec for task in world.tasks("a", TrainAdapter))
    assert world.coordinator.told("quorum_missed") == []
    assert world.coordinator.fleet.get("b").faults == 0


def test_a_device_that_may_not_send_is_excused_also_where_all_are_needed(world: World) -> None:
    world.devices["b"].behave = refusing("allowance")
    got: list[tuple[Reply, ...]] = []

    asking(world, 2, got)

    assert [[reply.device for reply in replies] for replies in got] == [["a"]]
    assert len(world.tasks("b", TrainAdapter)) == 1
    assert world.coordinator.told("quorum_missed") == []


def test_an_excuse_that_comes_while_the_quorum_looks_is_not_a_missed_round() -> None:
    """Its two questions, who is excused and who has closed, are about one moment."""
    rows = {name: AskRow(n, "run", name, "TrainAdapter", name, "", 0, "open") for n, name in ROWS}

    class Store:
        found: ClassVar = dict(rows)

        def ask_of_task(self, task: str) -> AskRow:
            seen = self.found[task]
            if task == "b":
                self.found[task] = replace(seen, state="excused")
            return seen

    answer = Waiting(rows["a"], 1, update(train(0)), checked=True)
    inbox = SimpleNamespace(waiting={1: answer})
    fleet = SimpleNamespace(is_active=lambda _: True)
    ask = Ask(train, BOTH, 2, PATIENCE_S)
    quorum = Quorum(ask, rows, inbox, Store(), fleet)  # type: ignore[arg-type]

    assert quorum.met(frozenset()) is None
    assert quorum.met(frozenset()) == [(answer, 0)]


def test_a_round_of_nobody_but_excused_devices_misses_its_quorum(world: World) -> None:
    world.devices["a"].behave = world.devices["b"].behave = refusing("allowance")

    with pytest.raises(QuorumMissed):
        asking(world, 2, [])


def test_what_a_device_reads_is_known_from_its_enrolment_and_its_newest_report(
    world: World, tmp_path: Path
) -> None:
    def known(name: str) -> frozenset[str]:
        return world.coordinator.fleet.abilities.about(name, 0).reads

    fleet, keys = world.coordinator.fleet, world.coordinator.identity
    device = FakeDevice("c", tmp_path / "edge", world.broker, keys)
    code = fleet.token("c", root_key_hash=bytes(32))
    words = device.enrolment(code.token_id, code.secret)
    device.courier.enrol(msgspec.structs.replace(words, reads=("codec.1",)), timeout_s=PATIENCE_S)
    at_first = known("c")
    report = ModelReport("none", "base", 0.5, 1, 1.0, 1.0, {}, ("codec.1", "delta.1"))
    device.courier.send("coordinator", report, task="none")

    until(lambda: known("c") == {"codec.1", "delta.1"}, PATIENCE_S)
    device.close()

    assert at_first == {"codec.1"}
    assert known("a") == frozenset()


@pytest.fixture
def lessons(tmp_path: Path) -> Iterator[Lessons]:
    made = Lessons(tmp_path)
    yield made
    made.close()


def test_a_lesson_that_lacks_two_things_is_sent_with_both_in_the_same_round(
    lessons: Lessons, tmp_path: Path
) -> None:
    """A device that lost what it kept says so one by one, and keeps nothing of what it refused."""
    names = ("a", "b")
    world = MktWorld(home_of(tmp_path / "llm"), {"slm": names})
    (family,) = world.families
    family.package = lessons.package
    family.exchange.about = lessons.coordinator.fleet.abilities.about
    fleet = devices(n=12, families={"slm": names})

    def forgetful(message: AnyMessage) -> AnyMessage | None:
        if isinstance(message, TeachAdapter) and message.round == 1:
            if not message.words:
                return Refused(message.task_id, "not here", ("words",))
            if not message.codec:
                return Refused(message.task_id, "nor this", ("codec",))
        said: AnyMessage | None = fleet["b"].answer(message)
        return said

    lessons.add("a", fleet["a"].answer)
    lessons.add("b", forgetful)
    cfg = replace(
        CFG,
        rounds=3,
        teach_on_devices=True,
        teach_llm=False,
        learn_codec=False,
        within_s=PATIENCE_S,
    )
    lessons.coordinator.runner.run(lambda resume: world.program(cfg, resume=resume), run="test")

    sent = {
        device.name: [
            (task.round, bool(task.words), bool(task.codec))
            for task in device.tasks()
            if isinstance(task, TeachAdapter)
        ]
        for device in lessons.devices
    }
    first, second, third = (0, True, False), (1, False, False), (2, False, False)
    assert sent["a"] == [first, second, third]
    assert sent["b"] == [first, second, (1, True, False), (1, True, True), third]
    told = [n["lessons_slm"] for n in lessons.coordinator.told("note") if "lessons_slm" in n]
    assert told == [2, 2, 2]
    assert lessons.coordinator.told("quorum_missed") == []
    assert set(lessons.faults().values()) == {0}
