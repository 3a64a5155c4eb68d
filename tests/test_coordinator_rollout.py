"""Roll-outs: tried on a few devices, judged by what they report, promoted or taken back by name."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from coordinator_world import Coordinator, FakeDevice, release_folder, until

from coordinator.programs import Publish
from coordinator.rollout import Book, Plan, State
from coordinator.staging import Stager
from edge_sdk import cli
from edge_sdk.errors import ConfigError, TrustError
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.models import ModelStore
from edge_sdk.wire.messages import AnyMessage, ModelReport, OfferModel, Refused

ME = {"who": "ann", "why": "a test"}


class World:
    """A coordinator with two releases and four devices that report what `scores` says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.broker = folder, MemoryBroker()
        self.coordinator = Coordinator(folder / "cloud", self.broker)
        self.registry = self.coordinator.registry
        self.scores = {"r1": 0.5, "r2": 0.6, "r3": 0.4}
        self.fails: set[str] = set()
        self.late: set[tuple[str, str]] = set()
        self.devices: dict[str, FakeDevice] = {}
        self.offers: list[tuple[str, str]] = []
        self.add("r1", promote=True)
        self.add("r2")
        self.open()
        self.coordinator.start()
        for name in ("d1", "d2", "d3", "d4"):
            self.enrol(name)

    def add(self, release: str, *, promote: bool = False, base: str | None = None) -> None:
        folder = release_folder(self.folder / release, release, data=release.encode())
        self.registry.publish(Publish("slm", release, folder, base=base), promote=promote)

    def open(self) -> None:
        c = self.coordinator
        self.book = Book(c.store, c.registry, time.time)
        self.stager = Stager(c.store, self.book, c.registry, c.fleet, c.runner, c.events, time.time)

    def enrol(self, name: str) -> None:
        def behave(message: AnyMessage) -> list[AnyMessage]:
            assert isinstance(message, OfferModel) or not hasattr(message, "release")
            if not isinstance(message, OfferModel):
                return []
            self.offers.append((name, message.release))
            if (name, message.release) in self.late:
                self.late.remove((name, message.release))
                return [Refused(message.task_id, "the release's metadata has expired (it was)")]
            if message.release in self.fails:
                return [Refused(message.task_id, "release failed its trial (exit 1)")]
            score = self.scores[message.release]
            report = ModelReport(message.task_id, message.release, score, 20, 10.0, 1.0, {})
            return [report]

        device = FakeDevice(
            name, self.folder / name, self.broker, self.coordinator.identity, behave=behave
        )
        self.devices[name] = device
        device.enrol(self.coordinator.fleet)

    def run(self, condition: Callable[[], object]) -> None:
        def tick() -> object:
            self.stager.tick()
            return condition()

        until(tick)

    def state(self) -> tuple[State, bool]:
        last = self.book.history("slm")[-1]
        return last.state, last.settled

    def assigned(self, device: str, release: str) -> bool:
        store = ModelStore(
            self.folder / "check" / f"{device}-{release}-{time.time_ns()}",
            root=self.registry.root(),
            probe=lambda held: None,
            device=device,
        )
        found = self.registry.release("slm", release)
        try:
            store.missing(found.offer(), now=datetime.now(UTC))
        except TrustError:
            return False
        return True

    def close(self) -> None:
        for device in self.devices.values():
            device.close()
        self.coordinator.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def test_a_release_is_tried_on_a_share_then_promoted_by_hand(world: World) -> None:
    world.book.stage("slm", "r2", Plan(share=0.5), **ME)

    world.run(lambda: len([o for o in world.book.offered(1, "trial") if o.state == "done"]) == 2)
    canary = world.book.history()[0].canary
    others = {"d1", "d2", "d3", "d4"} - set(canary)

    assert len(canary) == 2
    assert {device for device, release in world.offers if release == "r2"} == set(canary)
    assert world.registry.promoted("slm").release == "r1"
    assert all(world.assigned(device, "r2") for device in canary)
    assert not any(world.assigned(device, "r2") for device in others)

    world.book.promote("slm", **ME)
    world.run(lambda: world.state() == (State.PROMOTED, True))

    assert world.registry.promoted("slm").release == "r2"
    assert {device for device, release in world.offers if release == "r2"} == set(world.devices)
    assert world.offers.count((canary[0], "r2")) == 1
    assert not world.assigned("d1", "r1")
    assert [line["action"] for line in world.book.audit("slm")] == ["stage", "promote"]


def test_a_fall_in_accuracy_takes_it_back_by_itself(world: World) -> None:
    world.scores["r2"] = 0.3
    world.book.stage("slm", "r2", Plan(size=2, max_drop=0.1, promote=True), **ME)

    world.run(lambda: world.state() == (State.ROLLED_BACK, True))

    canary = world.book.history()[0].canary
    back = next(line for line in world.book.audit("slm") if line["action"] == "roll-back")
    assert back["who"] == "service"
    assert back["why"].startswith("accuracy fell from 0.500 to 0.300 on 40 examples")
    assert world.registry.promoted("slm").release == "r1"
    assert {d for d, release in world.offers if release == "r2"} == set(canary)
    assert all(world.offers[-1][1] == "r1" for _ in canary)
    assert not world.assigned(canary[0], "r2")


def test_a_failed_probe_takes_it_back_before_all_have_answered(world: World) -> None:
    world.fails.add("r2")
    world.book.stage("slm", "r2", Plan(size=3), **ME)

    world.run(lambda: world.state() == (State.ROLLED_BACK, True))

    why = world.book.history()[0].why
    assert why.startswith("it failed on ")
    assert "failed its trial (exit 1)" in why


def test_a_good_trial_may_promote_itself(world: World) -> None:
    world.book.stage("slm", "r2", Plan(size=1, promote=True), **ME)

    world.run(lambda: world.state() == (State.PROMOTED, True))

    assert {device for device, release in world.offers if release == "r2"} == set(world.devices)


def test_a_pause_offers_to_nobody_and_staging_again_goes_on(world: World) -> None:
    world.book.stage("slm", "r2", Plan(size=1), **ME)
    world.book.pause("slm", **ME)
    for _ in range(3):
        world.stager.tick()

    assert world.offers == []
    world.book.stage("slm", "r2", Plan(size=1), **ME)
    world.run(lambda: [o for o in world.book.offered(1, "trial") if o.state == "done"])
    assert [line["action"] for line in world.book.audit()] == ["stage", "pause", "stage"]


def test_nothing_begins_while_a_program_is_at_work(world: World) -> None:
    world.book.stage("slm", "r2", Plan(size=1), **ME)

    world.stager.tick(busy=True)

    assert world.book.history()[0].state is State.STAGED


def test_a_promoted_release_can_be_rolled_back_and_forward_metadata_says_so(world: World) -> None:
    world.book.stage("slm", "r2", Plan(size=1, promote=True), **ME)
    world.run(lambda: world.state() == (State.PROMOTED, True))
    before = world.registry.release("slm", "r1").metadata

    world.book.roll_back("slm", **ME)
    world.run(lambda: world.state() == (State.ROLLED_BACK, True))

    assert world.registry.promoted("slm").release == "r1"
    last = dict(world.offers)
    assert last == dict.fromkeys(world.devices, "r1")
    after = world.registry.release("slm", "r1").metadata

    def version(files: dict[str, bytes]) -> int:
        return int(json.loads(files["timestamp.json"])["signed"]["version"])

    assert version(after) > version(before)
    assert world.assigned("d1", "r1")
    assert not world.assigned("d1", "r2")


def test_a_kill_in_the_middle_loses_nothing(world: World) -> None:
    world.book.stage("slm", "r2", Plan(size=2, promote=True), **ME)
    world.run(lambda: world.book.offered(1, "trial"))

    world.open()  # another process reads the same book
    world.run(lambda: world.state() == (State.PROMOTED, True))

    assert sorted(d for d, release in world.offers if release == "r2") == sorted(world.devices)


def test_a_withdrawn_release_is_gone_for_good(world: World, tmp_path: Path) -> None:
    world.book.stage("slm", "r2", Plan(size=1), **ME)
    world.book.withdraw("slm", "r2", **ME)

    assert world.registry.release("slm", "r2") is None
    for attempt in (
        lambda: world.book.stage("slm", "r2", Plan(), **ME),
        lambda: world.book.withdraw("slm", "r2", **ME),
        lambda: world.book.roll_back("slm", to="r2", **ME),
    ):
        with pytest.raises(ConfigError, match="was withdrawn"):
            attempt()
    with pytest.raises(ConfigError, match="is what devices run"):
        world.book.withdraw("slm", "r1", **ME)


def test_a_release_over_another_brings_that_one_first(world: World) -> None:
    world.scores["a2"] = 0.7
    world.add("a2", base="r2")

    world.book.stage("slm", "a2", Plan(size=1, promote=True), **ME)
    world.run(lambda: world.state() == (State.PROMOTED, True))

    for device in world.devices:
        seen = [release for name, release in world.offers if name == device]
        assert seen[-2:] == ["r2", "a2"]
    with pytest.raises(ConfigError, match="is the base of a2"):
        world.book.withdraw("slm", "r2", **ME)


def test_a_device_that_enrols_late_gets_the_promoted_release_and_the_next(world: World) -> None:
    world.enrol("late")

    def serve() -> None:
        world.stager.serve_newcomers("slm", ("d1", "d2", "d3", "d4"))

    world.run(lambda: (serve(), ("late", "r1") in world.offers)[1])
    world.add("r3", promote=True)
    world.run(lambda: (serve(), ("late", "r3") in world.offers)[1])

    assert world.offers == [("late", "r1"), ("late", "r3")]


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (lambda book: book.stage("slm", "none", Plan(), **ME), "there are: r1, r2"),
        (lambda book: book.stage("slm", "r1", Plan(), **ME), "what devices run already"),
        (lambda book: book.promote("slm", **ME), "begin with `symbiont release stage slm"),
        (lambda book: book.pause("slm", **ME), "nothing to pause"),
        (lambda book: book.roll_back("slm", **ME), "no earlier release"),
        (lambda book: book.withdraw("slm", "none", **ME), "there is no release slm/none"),
    ],
)
def test_what_makes_no_sense_is_refused(
    world: World, attempt: Callable[[Book], object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        attempt(world.book)

    assert world.book.audit() == []


# --- commands -------------------------------------------------------------------------------------


def test_the_commands_decide_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from coordinator.config import CoordinatorConfig
    from coordinator.desk import Desk

    def run(*arguments: object, code: int = 0) -> dict[str, object]:
        assert cli.main([*map(str, arguments), "--json", "--config", str(path)]) == code
        found = capsys.readouterr().out
        return json.loads(found)

    assert cli.main(["coordinator", "init", str(tmp_path / "cloud")]) == 0
    capsys.readouterr()
    path = tmp_path / "cloud" / "coordinator.toml"
    with Desk(CoordinatorConfig.load(path)) as desk:
        registry = desk.registry()
        registry.prepare()
        registry.publish(Publish("slm", "r1", release_folder(tmp_path / "r1", "r1")))
    bundle = release_folder(tmp_path / "r2", "r2", data=b"new")

    staged = run("release", "stage", "slm", "r2", "--bundle", bundle, "--size", 2, "--why", "new")
    assert (staged["state"], staged["plan"]["size"]) == ("staged", 2)
    assert run("release", "pause", "slm", "--who", "bob")["state"] == "paused"
    assert run("release", "promote", "slm")["state"] == "promoted"
    listed = run("release", "list")["releases"]
    assert [(r["release"], r["state"]) for r in listed] == [("r1", "published"), ("r2", "promoted")]
    shown = run("release", "show", "slm", "r2")
    assert next((a["action"], a["why"]) for a in shown["audit"]) == ("stage", "new")
    assert shown["audit"][1]["who"] == "bob"
    assert run("release", "roll-back", "slm")["state"] == "rolled-back"
    assert run("release", "withdraw", "slm", "r2")["state"] == "withdrawn"
    assert run("release", "rotate-key", "timestamp")["role"] == "timestamp"
    failed = run("release", "stage", "slm", "r2", code=2)
    assert "was withdrawn" in failed["message"]
    assert "share" in run("release", "stage", "slm", "r1", "--share", 3, code=2)["message"]
    assert cli.main(["release", "list", "--config", str(path)]) == 0
    assert "slm/r1" in capsys.readouterr().out


def test_a_device_that_went_back_by_itself_is_offered_the_release_again(world: World) -> None:
    cohort = ("d1", "d2", "d3", "d4")
    world.stager.tick()
    world.stager.serve_newcomers("slm", cohort)
    assert world.offers == []

    reason = "refused by the device: the task is for release r1, this device runs r0"
    world.coordinator.store.refuse(10_000, "d2", "TrainAdapter", reason)
    world.run(lambda: (world.stager.serve_newcomers("slm", cohort), world.offers)[1])
    for _ in range(5):
        world.stager.tick()
        world.stager.serve_newcomers("slm", cohort)

    assert world.offers == [("d2", "r1")]


def test_an_offer_that_expired_on_its_way_is_made_again(world: World) -> None:
    world.late = {("d1", "r2"), ("d3", "r2")}
    world.book.stage("slm", "r2", Plan(share=1.0, promote=True), **ME)

    world.run(lambda: world.state()[0] is State.PROMOTED)

    assert sorted(d for d, release in world.offers if release == "r2") == [
        *("d1", "d1", "d2", "d3", "d3", "d4")
    ]
