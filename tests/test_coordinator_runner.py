"""The runner over real couriers and stores: quorum, lateness, refusals, restarts, SIGKILL."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coordinator_process import DEVICES, value
from coordinator_world import (
    Coordinator,
    FakeDevice,
    obedient,
    release_folder,
    train,
    until,
    update,
)

from coordinator.programs import Ask, Commit, Note, Program, Publish, Release, Reply, Tell
from coordinator.store import Store
from edge_sdk.errors import FleetError, LocalProtocolError, QuorumMissed
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import (
    AnyMessage,
    Enrolled,
    File,
    OfferData,
    Refused,
    Score,
    Scores,
    TrainAdapter,
    WantFiles,
)

BOTH = ("a", "b")
SOON_S = 5.0


class World:
    """One coordinator, two enrolled devices; `restart` closes the coordinator and opens it anew."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.broker = folder, MemoryBroker()
        self.coordinator = Coordinator(folder / "cloud", self.broker).start()
        self.devices = {
            name: FakeDevice(name, folder / "edge", self.broker, self.coordinator.identity)
            for name in BOTH
        }
        for device in self.devices.values():
            device.enrol(self.coordinator.fleet)

    def restart(self) -> Coordinator:
        self.coordinator.close()
        self.coordinator = Coordinator(self.folder / "cloud", self.broker).start()
        return self.coordinator

    def run(self, program: Callable[[Commit | None], Program], run: str = "test") -> None:
        self.coordinator.runner.run(program, run=run)

    def tasks(self, name: str, kind: type = TrainAdapter) -> list[AnyMessage]:
        return [m for m in self.devices[name].seen if isinstance(m, kind)]

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with self.coordinator.store.transaction() as db:
            return db.execute(query).fetchall()

    def close(self) -> None:
        for device in self.devices.values():
            device.close()
        self.coordinator.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def silent(_message: AnyMessage) -> list[AnyMessage]:
    return []


def asking(*asks: Ask, got: list[tuple[Reply, ...]]) -> Callable[[Commit | None], Program]:
    """Yield each Ask with a Commit after it; the replies go to `got`."""

    def program(resume: Commit | None) -> Program:
        first = 0 if resume is None else resume.step + 1
        for step, ask in list(enumerate(asks))[first:]:
            got.append((yield ask))
            yield Commit(step, {"step": str(step).encode()})

    return program


def test_a_round_reaches_all_and_is_counted_once(world: World) -> None:
    got: list[tuple[Reply, ...]] = []

    world.run(asking(Ask(train(0), BOTH, 2, SOON_S), got=got))

    assert [reply.device for reply in got[0]] == ["a", "b"]
    assert world.rows("SELECT device, step, kind FROM consumed ORDER BY device") == [
        ("a", 0, "TrainAdapter"),
        ("b", 0, "TrainAdapter"),
    ]
    assert world.coordinator.mailbox.unread() == []
    assert world.coordinator.store.finished("test")


def test_enrolment_brings_root_and_task(world: World) -> None:
    until(lambda: world.tasks("a", Enrolled))

    answer = world.tasks("a", Enrolled)[0]

    assert answer.tuf_root == world.coordinator.registry.root()
    until(lambda: len(world.coordinator.told("enrolled")) == 2)


def test_a_late_reply_comes_with_its_staleness(world: World) -> None:
    got: list[tuple[Reply, ...]] = []
    held: list[AnyMessage] = []
    world.devices["b"].behave = lambda m: held.append(m) or []

    def program(_: Commit | None) -> Program:
        got.append((yield Ask(train(0), BOTH, 1, SOON_S)))
        yield Commit(0, {})
        until(lambda: any(isinstance(m, TrainAdapter) for m in held))
        late = next(m for m in held if isinstance(m, TrainAdapter))
        world.devices["b"].courier.send("coordinator", update(late), task=late.task_id)
        until(lambda: len(world.coordinator.told("reply")) == 2)
        got.append((yield Ask(train(1), BOTH, 1, SOON_S)))
        until(lambda: len(world.coordinator.told("reply")) == 3)
        yield Commit(1, {})

    world.run(program)

    assert [(r.device, r.staleness) for r in got[0]] == [("a", 0)]
    assert ("b", 1) in [(r.device, r.staleness) for r in got[1]]


def test_a_late_reply_does_not_stand_in_when_all_are_needed(world: World) -> None:
    world.devices["b"].behave = silent

    def program(_: Commit | None) -> Program:
        yield Ask(train(0), BOTH, 1, SOON_S)
        yield Commit(0, {})
        until(lambda: world.tasks("b"))
        late = world.tasks("b")[0]
        world.devices["b"].courier.send("coordinator", update(late), task=late.task_id)
        until(lambda: len(world.coordinator.told("reply")) == 2)
        yield Ask(train(1), BOTH, 2, 0.3)

    with pytest.raises(QuorumMissed, match="1 of 2 useful replies"):
        world.run(program)


def test_scores_of_other_texts_are_never_delivered(world: World) -> None:
    """Scores fit only the texts they were asked for; a late set is dropped."""

    def judge(message: AnyMessage) -> list[AnyMessage]:
        return [Scores(message.task_id, (0.5,))] if isinstance(message, Score) else []

    got: list[tuple[Reply, ...]] = []
    world.devices["a"].behave = judge
    world.devices["b"].behave = silent

    def program(_: Commit | None) -> Program:
        yield Ask(Score("s", "base", ("one",), ("sum",)), BOTH, 1, SOON_S)
        yield Commit(0, {})
        until(lambda: world.tasks("b", Score))
        late = world.tasks("b", Score)[0]
        reply = Scores(late.task_id, (0.1,))
        world.devices["b"].courier.send("coordinator", reply, task=late.task_id)
        until(lambda: len(world.coordinator.told("reply")) == 2)
        got.append((yield Ask(Score("s", "base", ("two",), ("sum",)), BOTH, 1, SOON_S)))
        yield Commit(1, {})

    world.run(program)

    assert [(r.device, r.message.scores) for r in got[0]] == [("a", (0.5,))]
    assert world.coordinator.mailbox.unread() == []
    assert world.rows("SELECT device, reason FROM refused") == [("b", "too late to be of use")]


def test_a_refusal_is_an_answer_but_no_use(world: World) -> None:
    def refuse(message: AnyMessage) -> list[AnyMessage]:
        task_id = getattr(message, "task_id", None)
        return [Refused(task_id, "no room")] if task_id else []

    world.devices["b"].behave = refuse

    with pytest.raises(QuorumMissed, match="every device answered"):
        world.run(asking(Ask(train(0), BOTH, 2, 60.0), got=[]))

    assert world.coordinator.told("refused")[0]["reason"] == "no room"
    assert world.coordinator.fleet.get("b").faults == 0


def test_silence_misses_the_quorum_after_the_deadline(world: World) -> None:
    world.devices["a"].behave = world.devices["b"].behave = silent
    caught: list[str] = []

    def program(_: Commit | None) -> Program:
        try:
            yield Ask(train(0), BOTH, 1, 0.2)
        except QuorumMissed as exc:
            caught.append(str(exc))
        yield Commit(0, {})

    world.run(program)

    assert "no progress" in caught[0]


def test_asking_again_in_the_same_words_waits_instead_of_sending(world: World) -> None:
    world.devices["b"].behave = silent
    got: list[tuple[Reply, ...]] = []

    def program(_: Commit | None) -> Program:
        ask = Ask(train(0), BOTH, 2, 0.3)
        with pytest.raises(QuorumMissed):
            yield ask
        world.devices["b"].courier.send(
            "coordinator", update(world.tasks("b")[0]), task=world.tasks("b")[0].task_id
        )
        got.append((yield Ask(train(0), BOTH, 2, SOON_S)))
        yield Commit(0, {})

    world.run(program)

    assert [r.device for r in got[0]] == ["a", "b"]
    assert len(world.tasks("a")) == len(world.tasks("b")) == 1


BAD_REPLIES: dict[str, Callable[[TrainAdapter], AnyMessage]] = {
    "another round": lambda m: update(m, round=7),
    "another release": lambda m: update(m, release="other"),
    "another task": lambda m: update(m, task_id="trainadapter-999"),
    "another type": lambda m: Scores(m.task_id, (0.5,)),
    "not finite": lambda m: update(m, cosine=0.5, peak_mb=float("nan")),
    "fails the check": lambda m: update(m, codes=b"rubbish"),
    "somebody else's task": lambda m: update(m, task_id=m.task_id[:-1] + "1"),
}


@pytest.mark.parametrize("case", sorted(BAD_REPLIES))
def test_a_bad_reply_is_refused_and_the_others_go_on(world: World, case: str) -> None:
    def lie(message: AnyMessage) -> list[AnyMessage]:
        return [BAD_REPLIES[case](message)] if isinstance(message, TrainAdapter) else []

    def check(device: str, message: AnyMessage) -> None:
        if message.codes == b"rubbish":
            raise ValueError("malformed codes")

    world.devices["b"].behave = lie
    got: list[tuple[Reply, ...]] = []

    def program(_: Commit | None) -> Program:
        got.append((yield Ask(train(0), BOTH, 1, SOON_S, check=check)))
        with pytest.raises(QuorumMissed):
            yield Ask(train(0), BOTH, 2, 0.3, check=check)
        yield Commit(0, {})

    world.run(program)

    assert [r.device for r in got[0]] == ["a"]
    assert [e["device"] for e in world.coordinator.told("reply_refused")] == ["b"]
    assert world.coordinator.fleet.get("b").faults == 1
    assert world.rows("SELECT device FROM consumed") == [("a",)]


def test_files_are_served_while_the_program_is_busy(world: World, tmp_path: Path) -> None:
    folder = release_folder(tmp_path / "one", "base")
    released: list[Release] = []

    def program(_: Commit | None) -> Program:
        released.append((yield Publish("slm", "base", folder)))
        want = WantFiles("offer-1", released[0].targets)
        world.devices["a"].courier.send("coordinator", want, task="offer-1")
        until(lambda: len(world.tasks("a", File)) == 2)  # we are busy in `send` all the while
        yield Commit(0, {})

    world.run(program)

    files = {file.path: file.data for file in world.tasks("a", File)}
    assert files["slm/base/model.onnx"] == b"weights"
    assert set(files) == set(released[0].targets)


def test_a_wish_for_no_file_of_ours_is_refused(world: World) -> None:
    want = WantFiles("offer-1", ("../coordinator.db",))

    world.devices["a"].courier.send("coordinator", want, task="offer-1")
    until(lambda: world.coordinator.told("reply_refused"))

    assert world.tasks("a", File) == []
    assert "not a published file" in world.coordinator.told("reply_refused")[0]["reason"]


def test_tell_and_note_go_out_once(world: World) -> None:
    data = OfferData("d", 1, ("text",), ("sum",), (1.0,))

    def program(_: Commit | None) -> Program:
        yield Tell(data, BOTH)
        yield Tell(data, BOTH)
        yield Note({"round": 0, "accuracy": 0.5})
        yield Commit(0, {})

    world.run(program)
    until(lambda: world.tasks("a", OfferData) and world.tasks("b", OfferData))

    assert len(world.tasks("a", OfferData)) == 1
    assert world.coordinator.told("note")[0]["accuracy"] == 0.5


def test_a_revoked_device_no_longer_counts(world: World) -> None:
    world.coordinator.fleet.revoke("b")

    with pytest.raises(QuorumMissed, match="1 of 2"):
        world.run(asking(Ask(train(0), BOTH, 2, 60.0), got=[]))


def test_an_impossible_quorum_is_the_programs_mistake(world: World) -> None:
    with pytest.raises(LocalProtocolError, match="need=3 of 2"):
        world.run(asking(Ask(train(0), BOTH, 3, 1.0), got=[]))


def test_a_restart_amid_a_round_keeps_what_had_come(world: World) -> None:
    """One reply is in, the other device is slow; the coordinator is closed and opened again."""
    release = threading.Event()

    def slow(message: AnyMessage) -> list[AnyMessage]:
        release.wait(10)
        return obedient(message)

    world.devices["b"].behave = slow
    got: list[tuple[Reply, ...]] = []
    program = asking(Ask(train(0), BOTH, 2, 30.0), got=got)
    world.coordinator.runner.start(program, run="test")
    until(lambda: world.coordinator.told("reply"))

    world.restart()
    release.set()
    world.run(program)

    assert [r.device for r in got[0]] == ["a", "b"]
    assert len(world.tasks("a")) == len(world.tasks("b")) == 1
    assert world.rows("SELECT device FROM consumed ORDER BY device") == [("a",), ("b",)]


def test_a_finished_run_is_not_run_again(world: World) -> None:
    got: list[tuple[Reply, ...]] = []
    program = asking(Ask(train(0), BOTH, 2, SOON_S), got=got)
    world.run(program)

    world.restart()
    world.run(program)

    assert len(got) == 1


def test_a_failed_commit_consumes_nothing(world: World) -> None:
    """State, step and used replies are one transaction: break it at its end, nothing stays."""

    def program(_: Commit | None) -> Program:
        yield Ask(train(0), BOTH, 2, SOON_S)
        with world.coordinator.store.transaction() as db:
            db.execute(
                "CREATE TRIGGER broken BEFORE UPDATE ON asks WHEN NEW.state = 'closed'"
                " BEGIN SELECT RAISE(ABORT, 'disk'); END"
            )
        yield Commit(0, {"x": b"1"})

    with pytest.raises(Exception, match="disk"):
        world.run(program)

    assert world.rows("SELECT * FROM consumed") == []
    assert world.rows("SELECT * FROM commits") == []
    assert len(world.coordinator.mailbox.unread()) == 2


def test_a_program_that_fails_is_reported_and_can_start_again(world: World) -> None:
    def broken(_: Commit | None) -> Program:
        yield Note({})
        raise FleetError("out of luck")

    thread = world.coordinator.runner.start(broken, run="test")
    thread.join(SOON_S)

    assert "out of luck" in str(world.coordinator.runner.failure)
    assert not world.coordinator.store.finished("test")
    world.run(asking(Ask(train(0), BOTH, 2, SOON_S), got=[]))
    assert world.coordinator.store.finished("test")


def test_sigkill_at_any_point_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Killed after a seeded number of events, again and again; the database is the judge."""
    rng, rounds, kills = random.Random(7), 6, 0
    command = [sys.executable, str(Path(__file__).with_name("coordinator_process.py"))]
    for _ in range(40):
        process = subprocess.Popen(
            [*command, str(tmp_path / "w"), str(rounds)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        assert process.stdout is not None
        left = rng.randint(1, 14) if kills < 8 else 10_000
        for line in process.stdout:
            json.loads(line)
            left -= 1
            if left == 0:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        if process.wait() == 0:
            break
        kills += 1

    with Mailbox(tmp_path / "w" / "coordinator.db") as mailbox:
        store = Store(mailbox, lambda: 0.0)
        with store.transaction() as db:
            counted = db.execute("SELECT step, device FROM consumed ORDER BY step, device")
            assert counted.fetchall() == [(s, d) for s in range(rounds) for d in DEVICES]
            assert db.execute("SELECT COUNT(*) FROM refused").fetchone() == (0,)
        total = int(store.last_commit("sum").state["total"])
        assert mailbox.unread() == []
    assert total == sum(value(d, r) for d in DEVICES for r in range(rounds))
    assert kills >= 4
