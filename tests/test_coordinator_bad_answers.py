"""Rows, lessons and scores that cannot be, each from a device of its own, over real couriers.

Every one is refused with its reason, counted against its sender and asked for once; the round goes
on with those of the honest device.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from coordinator_world import Coordinator, FakeDevice, release_folder
from fleet_of_four import Device, examples
from learning_world import TASK, model, tokenizer
from mkt_world import CFG, SPEC, World, devices, home_of
from test_coordinator_crosslm import CFG as CROSS
from test_coordinator_crosslm import World as CrossWorld

from coordinator.algorithms.crosslm import crosslm
from coordinator.families import Family
from coordinator.programs import Commit, Program, Publish
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.train.lora import Adapter
from edge_sdk.train.text_task import TaskReader
from edge_sdk.wire.messages import AnyMessage, LogitRows, Score, Scores, TeachAdapter

HONEST = "honest"
Lie = Callable[[Any], AnyMessage]
changed = msgspec.structs.replace


def outside(rows: LogitRows) -> LogitRows:
    return changed(rows, ids=np.full(len(rows.ids) // 2, 60_000, "<u2").tobytes())


def not_a_number(rows: LogitRows) -> LogitRows:
    return changed(rows, logps=np.full(len(rows.logps) // 2, np.nan, "<f2").tobytes())


ROWS: dict[str, tuple[Lie, str]] = {
    "other-texts": (lambda m: changed(m, places=bytes(32)), "told of other texts"),
    "too-short": (lambda m: changed(m, truth=m.truth[:-4]), "truth has"),
    "fewer": (lambda m: changed(m, kept=4), "sent 4 entries a row"),
    "outside": (outside, "token id 60000 is outside the vocabulary"),
    "nan": (not_a_number, "not finite"),
    "too-good": (lambda m: changed(m, truth=bytes(len(m.truth))), "the loss claimed"),
    "other-round": (lambda m: changed(m, round=7), "of round 7"),
    "other-release": (lambda m: changed(m, release="other"), "about release other"),
    "figures": (lambda m: changed(m, peak_mb=float("nan")), "is not finite"),
    "other-kind": (lambda m: Scores(m.task_id, (0.5,)), "a Scores where LogitRows was asked"),
}
SCORES: dict[str, tuple[Lie, str]] = {
    "above": (lambda m: changed(m, scores=(1.5, *m.scores[1:])), "scores"),
    "below": (lambda m: changed(m, scores=(-0.1, *m.scores[1:])), "scores"),
    "nan": (lambda m: changed(m, scores=(float("nan"), *m.scores[1:])), "scores"),
    "few": (lambda m: changed(m, scores=m.scores[1:]), "scores for"),
}


class Fleet:
    """A coordinator over a memory broker, and devices whose answers may be altered."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder, self.broker = folder, MemoryBroker()
        self.coordinator = Coordinator(folder / "cloud", self.broker).start()
        self.coordinator.registry.publish(Publish("slm", "base", self.package("base")))
        self.devices: list[FakeDevice] = []

    def add(self, name: str, answer: Callable[[AnyMessage], AnyMessage | None]) -> None:
        def behave(message: AnyMessage) -> list[AnyMessage]:
            said = answer(message)
            return [] if said is None else [said]

        cloud = self.coordinator
        device = FakeDevice(name, self.folder / "edge", self.broker, cloud.identity, behave=behave)
        self.devices.append(device)
        device.enrol(cloud.fleet, timeout_s=60.0)

    def package(self, name: str, _factors: object = None) -> Path:
        return release_folder(self.folder / name, name)

    def refused(self) -> dict[str, tuple[str, str]]:
        """Device -> kind and reason of what of it was refused."""
        told = self.coordinator.told("reply_refused")
        assert len({event["device"] for event in told}) == len(told)
        return {str(e["device"]): (str(e["kind"]), str(e["reason"])) for e in told}

    def faults(self) -> dict[str, int]:
        return {d.name: self.coordinator.fleet.get(d.name).faults for d in self.devices}

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.coordinator.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    made.close()


def test_fedmkt_goes_on_without_rows_and_lessons_that_cannot_be(
    fleet: Fleet, tmp_path: Path
) -> None:
    lies = ROWS | {"lesson": (lambda m: changed(m, codes=b"rubbish"), "codes")}
    names = (HONEST, *lies)
    world = World(home_of(tmp_path / "llm"), {"slm": names})
    world.families[0].package = fleet.package
    made = devices(n=12, families={"slm": names})

    def answering(name: str) -> Callable[[AnyMessage], AnyMessage | None]:
        lie, _ = lies.get(name, (None, ""))

        def answer(message: AnyMessage) -> AnyMessage | None:
            said: AnyMessage | None = made[name].answer(message)
            wrong = isinstance(message, TeachAdapter) if name == "lesson" else False
            wrong = wrong or (name in ROWS and isinstance(said, LogitRows))
            return lie(said) if lie is not None and wrong else said

        return answer

    for name in names:
        fleet.add(name, answering(name))
    cfg = replace(CFG, rounds=1, teach_on_devices=True, within_s=60.0)

    def program(resume: Commit | None) -> Program:
        program: Program = world.program(cfg, resume=resume)
        return program

    fleet.coordinator.runner.run(program, run="test")

    refused = fleet.refused()
    assert set(refused) == set(lies)
    for name, (_, reason) in lies.items():
        kind = {"lesson": "AdapterUpdate", "other-kind": "Scores"}.get(name, "LogitRows")
        assert refused[name][0] == kind
        assert reason in refused[name][1], name
    assert fleet.faults() == {HONEST: 0} | dict.fromkeys(lies, 1)
    for device in fleet.devices:
        asked = [type(message).__name__ for message in device.tasks()]
        assert asked.count("TopLogits") == asked.count("TeachAdapter") == 1
    (note,) = (n for n in fleet.coordinator.told("note") if "round" in n)
    assert set(note["by"]) == {HONEST, "lesson"}
    assert note["lessons_slm"] == len(names) - 1
    assert fleet.coordinator.store.finished("test")
    assert fleet.coordinator.registry.promoted("slm").release == "base-fedmkt-1"


def test_crosslm_goes_on_without_scores_that_cannot_be(fleet: Fleet, tmp_path: Path) -> None:
    from learning_world import folder

    names = (HONEST, *SCORES)
    world = CrossWorld(folder(tmp_path / "llm", seed=4))
    honest: list[Scores] = []

    def answering(name: str, seed: int) -> Callable[[AnyMessage], AnyMessage | None]:
        reader = TaskReader(TASK, tokenizer(), max_tokens=32)
        device = Device(name, Adapter(model(), SPEC), reader, examples(12, seed=seed))

        def answer(message: AnyMessage) -> AnyMessage | None:
            said: AnyMessage | None = device.answer(message)
            if not isinstance(said, Scores):
                return said
            if name == HONEST:
                honest.append(said)
                return said
            return SCORES[name][0](said)

        return answer

    for seed, name in enumerate(names):
        fleet.add(name, answering(name, seed))
    cfg = replace(CROSS, rounds=1, score_on_devices=True, within_s=60.0)
    family = Family(world.twin, world.exchange, names, "base", fleet.package)
    world.exchange.family = "slm"

    fleet.coordinator.runner.run(
        lambda resume: crosslm(world.llm, [family], cfg, seed=3, resume=resume), run="test"
    )

    assert set(fleet.refused()) == set(SCORES)
    for name, (_, reason) in SCORES.items():
        kind, said = fleet.refused()[name]
        assert kind == "Scores"
        assert reason in said, name
    assert fleet.faults() == {HONEST: 0} | dict.fromkeys(SCORES, 1)
    assert {[type(m) for m in device.tasks()].count(Score) for device in fleet.devices} == {1}
    (said,) = honest
    (note,) = (n for n in fleet.coordinator.told("note") if "round" in n)
    assert note["score"] == round(sum(said.scores) / cfg.samples, 4)  # not of all five replicas
    assert fleet.coordinator.store.finished("test")
