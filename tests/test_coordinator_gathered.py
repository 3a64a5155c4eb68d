"""Answers that a round can do without: who refused or lied is not asked a second time."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.algorithms.rounds import gathered
from coordinator.programs import Ask, Commit, Program, Reply
from edge_sdk.wire.messages import AnyMessage, LogitRows, Refused, TopLogits
from tests.test_coordinator_runner import BOTH, SOON_S, World, silent

TASK = TopLogits("rows", 0, "slm", "base", ("a text",), ("sum",), 4)


def telling(message: AnyMessage) -> list[AnyMessage]:
    if not isinstance(message, TopLogits):
        return []
    rows = (bytes(32), message.kept, b"", b"", b"", {}, 1.0)
    return [LogitRows(message.task_id, message.round, message.release, *rows)]


def refusing(message: AnyMessage) -> list[AnyMessage]:
    return [Refused(message.task_id, "no room")] if isinstance(message, TopLogits) else []


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.devices["a"].behave = telling
    yield made
    made.close()


def gathering(world: World) -> list[tuple[Reply, ...]]:
    got: list[tuple[Reply, ...]] = []

    def check(device: str, _message: AnyMessage) -> None:
        if device == "b":
            raise ValueError("rows of other texts")

    def program(_: Commit | None) -> Program:
        got.append((yield from gathered(Ask(TASK, BOTH, 2, SOON_S, check=check))))
        yield Commit(0, {})

    world.run(program)
    return got


@pytest.mark.parametrize("behave", [refusing, telling], ids=["refuses", "lies"])
def test_who_refused_or_lied_is_asked_once(world: World, behave) -> None:  # type: ignore[no-untyped-def]
    world.devices["b"].behave = behave

    got = gathering(world)

    assert [[reply.device for reply in replies] for replies in got] == [["a"]]
    assert len(world.tasks("a", TopLogits)) == len(world.tasks("b", TopLogits)) == 1
    assert world.coordinator.fleet.get("b").faults == (behave is telling)
    assert world.rows("SELECT device, kind FROM consumed") == [("a", "TopLogits")]


def test_silence_costs_one_deadline(world: World) -> None:
    world.devices["b"].behave = silent
    got: list[tuple[Reply, ...]] = []

    def program(_: Commit | None) -> Program:
        yield Ask(TASK, BOTH, 1, SOON_S)  # so that the answer of a is there in good time
        got.append((yield from gathered(Ask(TASK, BOTH, 2, 0.2))))
        yield Commit(0, {})

    world.run(program)

    assert [[reply.device for reply in replies] for replies in got] == [["a"]]
    assert len(world.coordinator.told("quorum_missed")) == 1
    assert len(world.tasks("a", TopLogits)) == len(world.tasks("b", TopLogits)) == 1


def test_nobody_at_all_is_an_empty_answer(world: World) -> None:
    world.devices["a"].behave = world.devices["b"].behave = refusing

    assert gathering(world) == [()]
    assert len(world.tasks("a", TopLogits)) == len(world.tasks("b", TopLogits)) == 1
