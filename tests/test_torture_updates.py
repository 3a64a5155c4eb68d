"""Hostile updates, short form: each is refused with its reason, counted, and the round goes on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coordinator_world import Coordinator, FakeDevice, obedient, train, until, update

from coordinator.fleet import DeviceState
from coordinator.programs import Ask, Commit, Program, Reply
from coordinator.quarantine import FaultRule
from edge_sdk.errors import QuorumMissed
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.wire.messages import (
    AnyMessage,
    ModelReport,
    OfferModel,
    Refused,
    Score,
    Scores,
    TrainAdapter,
)
from tests.torture import b11_poisoning
from tests.torture.result import Scale

GOOD, BAD = "good", "hostile"


class World:
    """One coordinator, an honest device and a hostile one."""

    def __init__(self, folder: Path) -> None:
        self.broker = MemoryBroker()
        self.coordinator = Coordinator(folder / "cloud", self.broker).start()
        identity = self.coordinator.identity
        self.good = FakeDevice(GOOD, folder / "edge", self.broker, identity, behave=honest)
        self.bad = FakeDevice(BAD, folder / "edge", self.broker, identity)
        for device in (self.good, self.bad):
            device.enrol(self.coordinator.fleet)

    def faults(self) -> dict[str, int]:
        found: dict[str, int] = self.coordinator.fleet.quarantine.of(BAD)["steps"]
        return found

    def close(self) -> None:
        for device in (self.good, self.bad):
            device.close()
        self.coordinator.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def honest(message: AnyMessage) -> list[AnyMessage]:
    match message:
        case Score():
            return [Scores(message.task_id, (0.5,) * len(message.texts))]
        case OfferModel():
            return [ModelReport(message.task_id, message.release, 0.5, 9, 1.0, 1.0, {})]
    return obedient(message)


SCORE = Score("s", "base", ("one", "two"), ("sum", "story"))
OFFER = OfferModel("o", "slm", "base", {}, ())


def score(*values: float) -> Callable[[AnyMessage], AnyMessage]:
    return lambda task: Scores(getattr(task, "task_id", ""), values)


def report(**changes: object) -> Callable[[AnyMessage], AnyMessage]:
    fields = {"accuracy": 0.5, "examples": 9, "tokens_per_s": 1.0, "peak_mb": 1.0, "seconds": {}}
    return lambda task: ModelReport(task.task_id, "base", **{**fields, **changes})  # type: ignore


LIES: dict[str, tuple[AnyMessage, Callable[[AnyMessage], AnyMessage], str, str]] = {
    "a score above 1": (SCORE, score(0.5, 1.5), "not_understood", "<= 1"),
    "a score below 0": (SCORE, score(-0.1, 0.5), "not_understood", ">= 0"),
    "a score that is no number": (SCORE, score(0.5, float("nan")), "not_understood", ""),
    "scores of other texts": (SCORE, score(0.5), "reply", "1 scores for 2 texts"),
    "an accuracy above 1": (OFFER, report(accuracy=2.0), "not_understood", "<= 1"),
    "a negative speed": (OFFER, report(tokens_per_s=-1.0), "reply", "outside 0 to"),
    "endless stages": (
        OFFER,
        report(seconds={f"stage-{i}": 1.0 for i in range(999)}),
        "not_understood",
        "length <=",
    ),
    "a bomb of text": (
        SCORE,
        lambda task: Refused(getattr(task, "task_id", ""), "x" * 400_000),
        "too_large",
        "over the limit",
    ),
    "a figure beyond reason": (OFFER, report(peak_mb=1e300), "reply", "outside 0 to"),
    "more examples than there are": (
        train(0),
        lambda task: update(task, examples=2**50),
        "not_understood",
        "<= 1099511627776",
    ),
    "a check that crashes": (
        train(0),
        lambda task: update(task, codes=b"crash"),
        "update",
        "could not be checked (ZeroDivisionError)",
    ),
}


def check(_device: str, message: AnyMessage) -> None:
    if getattr(message, "codes", b"") == b"crash":
        raise ZeroDivisionError


@pytest.mark.parametrize("case", sorted(LIES))
def test_a_lie_is_refused_with_its_reason_and_counted_and_the_round_goes_on(
    world: World, case: str
) -> None:
    task, lie, step, said = LIES[case]
    world.bad.behave = lambda m: [lie(m)] if type(m) is type(task) else []
    got: list[tuple[Reply, ...]] = []

    def program(_: Commit | None) -> Program:
        got.append((yield Ask(task, (GOOD, BAD), 1, 10.0, check=check)))
        with pytest.raises(QuorumMissed, match="every device answered"):
            yield Ask(task, (GOOD, BAD), 2, 10.0, check=check)
        yield Commit(0, {})

    world.coordinator.runner.run(program, run="test")

    assert [reply.device for reply in got[0]] == [GOOD]
    assert world.faults() == {step: 1}
    assert said in world.coordinator.fleet.quarantine.of(BAD)["last_fault"]
    told = world.coordinator.told("reply_refused")
    assert [event["device"] for event in told] == [BAD]
    assert world.coordinator.fleet.quarantine.of(GOOD)["steps"] == {}


def test_repeated_faults_put_a_device_aside_until_its_term_ends(world: World) -> None:
    fleet, now = world.coordinator.fleet, [1000.0]
    fleet.quarantine._now = lambda: now[0]
    fleet.quarantine.rule = FaultRule(faults=3, within_s=100.0, lasts_s=50.0)

    for _ in range(2):
        assert not fleet.fault(BAD, "reply", "nonsense")
    now[0] += 200.0  # those two are forgotten
    assert [fleet.fault(BAD) for _ in range(3)] == [False, False, True]
    assert fleet.active() == (GOOD,)
    assert fleet.quarantine.of(BAD)["quarantined_until"] == now[0] + 50.0
    now[0] += 51.0

    assert fleet.is_active(BAD)
    assert fleet.quarantine.of(BAD)["quarantined_until"] is None
    assert not fleet.fault(BAD)  # it begins at nothing again


def test_the_operator_lifts_a_quarantine_that_has_no_end(world: World) -> None:
    fleet = world.coordinator.fleet
    while not fleet.fault(BAD, "reply", "nonsense"):
        pass
    assert fleet.get(BAD).state == DeviceState.QUARANTINED  # type: ignore[union-attr]
    assert fleet.quarantine.of(BAD)["quarantined_until"] == 0.0

    fleet.approve(BAD)

    assert fleet.is_active(BAD)
    assert not fleet.fault(BAD)


def test_what_a_quarantined_device_sends_is_put_away_and_no_further_fault(world: World) -> None:
    fleet = world.coordinator.fleet
    while not fleet.fault(BAD, "reply", "nonsense"):
        pass
    before = world.faults()

    world.bad.courier.send("coordinator", Refused("t", "no"), task="t")
    until(lambda: not world.bad.mailbox.pending())
    until(lambda: not world.coordinator.mailbox.unread())

    assert world.faults() == before


def test_a_device_counts_once_a_round_however_the_program_asks(world: World) -> None:
    """Two tasks for one round, in different words: both answered, one counted."""
    got: list[tuple[Reply, ...]] = []

    def program(_: Commit | None) -> Program:
        yield Ask(train(0), (GOOD, BAD), 1, 5.0)
        until(lambda: len(world.coordinator.told("reply")) == 2)
        got.append((yield Ask(train(0, steps=2), (GOOD, BAD), 2, 5.0)))
        until(lambda: len(world.coordinator.told("reply")) == 4)
        yield Commit(0, {})
        with pytest.raises(QuorumMissed):
            yield Ask(train(0, steps=3), (GOOD,), 1, 5.0)
        yield Commit(1, {})

    world.bad.behave = lambda m: obedient(m) if isinstance(m, TrainAdapter) else []
    with pytest.raises(Exception, match="UNIQUE"):
        # A program that used one device twice for one round is stopped by the key itself ...
        world.coordinator.runner.run(program, run="test")

    assert sorted(reply.device for reply in got[0]) == [GOOD, BAD]  # ... after no late double
    with world.coordinator.store.transaction() as db:
        assert db.execute("SELECT COUNT(*) FROM counted").fetchone() == (0,)


def test_poisoning_short(tmp_path: Path) -> None:
    result = b11_poisoning.run(Scale.SHORT, 7, tmp_path)

    assert result.passed, str(result)
