"""Killed at every request of a program, and right after: the end is the uninterrupted run's, bit
for bit, and every update that was confirmed is in exactly one round."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from coordinator_world import Coordinator, FakeDevice, release_folder

from compression.codec import Compressor
from coordinator.algorithms.fedavg import FedAvgConfig, fedavg
from coordinator.exchange import AdapterExchange
from coordinator.families import Family
from coordinator.gate import Gate
from coordinator.programs import Commit, Program, ProgramFactory, Publish, Withdraw
from coordinator.store import state_digest
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.train.lora import Factors, LoraSpec
from edge_sdk.wire.messages import AdapterUpdate, AnyMessage, ModelReport, OfferModel, TrainAdapter

LAYOUT = {"q_proj.lora_A": (2, 24), "q_proj.lora_B": (16, 2)}
NAMES = ("a", "b", "c")
ROUNDS = 3
WORSE = "base-fedavg-2"
"""The release that every device finds worse, so that its round is rolled back."""


class Killed(BaseException):
    """What a SIGKILL is to a program: no handler of an Exception sees it."""


class NoTwin:
    """What a family needs of its twin to be averaged: nothing is scored here, so no model."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    def restore(self, factors: Factors, _replicas: object) -> None:
        self.factors = factors

    def set_global(self, factors: Factors) -> None:
        self.factors = factors


def answers(name: str) -> object:
    """A device whose update follows from its task alone, as a real one's seeded training does."""
    codecs: dict[str, Compressor] = {}

    def behave(message: AnyMessage) -> list[AnyMessage]:
        if isinstance(message, TrainAdapter):
            if message.codec:
                codecs[message.codec_id] = Compressor.from_bytes(message.codec)
            rng = np.random.default_rng([NAMES.index(name), message.round])
            change = {k: rng.normal(size=s).astype(np.float32) * 0.1 for k, s in LAYOUT.items()}
            codec = codecs[message.codec_id]
            codes = codec.encode(change, bytes_target=message.bytes_target).data
            figures = (5 + NAMES.index(name), codec.raw_bytes, 0.9, {}, 1.0)
            return [
                AdapterUpdate(
                    message.task_id, message.round, message.release, codec.codec_id, codes, *figures
                )
            ]
        if isinstance(message, OfferModel):
            share = 0.2 if message.release == WORSE else 0.8
            return [ModelReport(message.task_id, message.release, share, 500, 1.0, 1.0, {})]
        return []

    return behave


class Life:
    """One fleet and one database; the coordinator dies and comes back over it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.broker = folder, MemoryBroker()
        self.coordinator = Coordinator(folder / "cloud", self.broker).start()
        self.devices = [
            FakeDevice(
                name,
                folder / "edge",
                self.broker,
                self.coordinator.identity,
                behave=answers(name),  # type: ignore[arg-type]
            )
            for name in NAMES
        ]
        for device in self.devices:
            device.enrol(self.coordinator.fleet)
        base = release_folder(folder / "base", "base")
        self.coordinator.registry.publish(Publish("slm", "base", base))

    def program(self, resume: Commit | None) -> Program:
        exchange = AdapterExchange("slm", LAYOUT, LoraSpec(2, 4.0, ("q_proj",)), seed=3)

        def package(name: str, _factors: object) -> Path:
            found = self.folder / name
            return found if found.exists() else release_folder(found, name)

        plan = FedAvgConfig(rounds=ROUNDS, within_s=20.0)
        twin = NoTwin(exchange.factors)
        family = Family(twin, exchange, NAMES, "base", package, gate=Gate(0.05))  # type: ignore[arg-type]
        return fedavg([family], plan, resume=resume)

    def restart(self) -> None:
        self.coordinator.close()
        self.coordinator = Coordinator(self.folder / "cloud", self.broker).start()

    def ended(self) -> tuple[str, list[tuple[object, ...]], list[tuple[object, ...]]]:
        """The digest of the last state, who counted when, and which releases run."""
        commit = self.coordinator.store.last_commit("test")
        assert commit is not None
        with self.coordinator.store.transaction() as db:
            counted = db.execute(
                "SELECT step, device, round, kind FROM counted"
                " WHERE kind = 'TrainAdapter' ORDER BY 1, 2, 3"
            ).fetchall()
            releases = db.execute(
                "SELECT release, promoted FROM releases ORDER BY number"
            ).fetchall()
            # Reports on a release that was taken back before the kill come too late to be of use.
            lost = "SELECT COUNT(*) FROM refused WHERE kind != 'OfferModel'"
            assert db.execute(lost).fetchone() == (0,)
            assert db.execute("SELECT COUNT(*) FROM faults").fetchone() == (0,)
        return state_digest(commit.state), counted, releases

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.coordinator.close()


def deadly(program: ProgramFactory, at: int, *, log: list[str]) -> ProgramFactory:
    """The program, killed when it has made its request number `at`, which is not carried out.

    Between two requests a program only computes, so this is also the kill after the one before.
    """

    def build(resume: Commit | None) -> Program:
        inner, answer = program(resume), None
        for count in itertools.count():
            try:
                request = inner.send(answer)
            except StopIteration:
                log.append("end")
                if count == at:
                    raise Killed from None
                return
            log.append(type(request).__name__)
            if count == at:
                raise Killed
            answer = yield request

    return build


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, list[str]]:
    """The uninterrupted run: how it ends, and its requests."""
    life, log = Life(tmp_path_factory.mktemp("whole")), []
    life.coordinator.runner.run(deadly(life.program, -1, log=log), run="test")
    ended = life.ended()
    life.close()
    return ended, log


def test_the_uninterrupted_run_takes_its_second_round_back(whole: tuple[object, list[str]]) -> None:
    (_, counted, releases), log = whole
    assert log.count("Commit") == ROUNDS
    assert log.count(Withdraw.__name__) == 1
    assert counted == [(s, n, str(s), "TrainAdapter") for s in range(ROUNDS) for n in NAMES]
    assert releases == [
        ("base", 0),
        ("base-fedavg-1", 0),
        (WORSE, 0),
        ("base-fedavg-3", 1),
    ]


@pytest.mark.slow
def test_killed_at_every_request_it_ends_the_same(
    tmp_path: Path, whole: tuple[object, list[str]]
) -> None:
    ended, log = whole
    for at in range(len(log)):
        folder = tmp_path / str(at)
        folder.mkdir()
        life = Life(folder)
        with pytest.raises(Killed):
            life.coordinator.runner.run(deadly(life.program, at, log=[]), run="test")
        life.restart()
        life.coordinator.runner.run(life.program, run="test")

        assert life.ended() == ended, f"killed at request {at}, a {log[at]}"
        life.close()
