"""The service's whole life with real devices, models and signatures over the memory broker."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coordinator_world import until
from edge_world import TASK, example_set
from edge_world import config as edge_config
from exporters_tiny import save_tiny
from service_world import Devices, settings

from coordinator.config import CoordinatorConfig
from coordinator.programs import Publish
from coordinator.rollout import Plan
from coordinator.service import Service
from edge_sdk.agent import EdgeDevice
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.wire.config_rules import parse_toml
from exporters.slm import SlmOptions, export_slm

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
name = "{name}"
cohort = 2
rounds = 2
samples = 8
tau = 0.0
max_new_tokens = 8
distil_steps = 2
"""
JUDGED = """
[evaluation]
path = "{folder}/judged.jsonl"
"""


def coordinator_toml(folder: Path, name: str) -> str:
    return settings(
        folder,
        PROGRAM.format(name=name),
        families=["tiny"],
        task=TASK,
        more=JUDGED.format(folder=folder),
    )


class Life:
    """A service and two devices; `events` are what the service wrote."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.broker, self.name = folder, MemoryBroker(), name
        save_tiny(folder / "tiny")
        save_tiny(folder / "llm", hidden_size=32, intermediate_size=48)
        lines = [json.dumps({"text": e.text, "label": e.label}) for e in example_set(2)]
        (folder / "judged.jsonl").write_text("\n".join(lines))
        self.stream = io.StringIO()
        self._fleet = Devices()
        self.open()

    @property
    def devices(self) -> list[EdgeDevice]:
        return self._fleet.all

    def open(self) -> Service:
        config = parse_toml(coordinator_toml(self.folder, self.name), CoordinatorConfig, "test")
        self.service = Service(config, link=self.broker.link("coordinator"), stream=self.stream)
        return self.service

    def enrol(self, name: str) -> EdgeDevice:
        device = EdgeDevice(
            edge_config(self.folder / name, f"[train]\nthreads = 1\nseed = {len(self.devices)}"),
            link=self.broker.link(name),
        )
        self._fleet.add(device, example_set(6))
        device.enrol(self.service.desk.token(name, lasts_s=600).to_text())
        if len(self.devices) == 2:
            self._fleet.start()
        return device

    def told(self, name: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.stream.getvalue().splitlines()]
        return [line for line in lines if line["event"] == name]

    def close(self) -> None:
        self._fleet.close()
        self.service.close()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Callable[[str], Life]]:
    lives: list[Life] = []

    def open_life(name: str) -> Life:
        lives.append(Life(tmp_path, name))
        return lives[-1]

    yield open_life
    for life in lives:
        life.close()


def test_crosslm_from_enrolment_to_the_last_release(live: Callable[[str], Life]) -> None:
    life = live("crosslm")
    outcome: list[object] = []

    def serve() -> None:
        try:
            outcome.append(life.service.serve())
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=serve)
    thread.start()
    until(lambda: life.told("started"))
    devices = [life.enrol("kitchen-1"), life.enrol("garage-1")]
    thread.join(120)

    assert outcome == [True]
    assert life.service.registry.promoted("tiny").release == "base-distilled"
    lineage = [line["release"] for line in life.service.registry.lineage("tiny")]
    assert lineage == ["base", "base-crosslm-1", "base-distilled"]
    assert {device.status()["release"] for device in devices} == {"base-distilled"}
    notes = life.told("note")
    assert [note.get("round") for note in notes] == [None, 0, 1]
    assert "llm_accuracy" in notes[-1]
    fetched = [line["device"] for line in life.told("files")]
    assert sorted(fetched) == ["garage-1"] * 2 + ["kitchen-1"] * 2  # base and the last, whole
    assert life.told("llm")[0]["stage"] == "before"
    done = life.told("done")[0]
    assert done["devices"] == ["garage-1", "kitchen-1"]
    assert all(counted["up"] > 0 for counted in done["bytes_by_device"].values())
    assert life.told("reply_refused") == life.told("refused") == []
    assert TASK.labels == life.service.config.task.labels


def test_a_stopped_service_goes_on_where_it_was(live: Callable[[str], Life]) -> None:
    life = live("fedavg")
    thread = threading.Thread(target=life.service.serve)
    thread.start()
    until(lambda: life.told("started"))
    life.enrol("kitchen-1")
    life.enrol("garage-1")
    until(lambda: life.told("committed") and life.told("published"), 60)
    life.service.stop()
    thread.join(60)
    life.service.close()

    done = life.open().serve()

    assert done
    steps = [(e["run"], e["step"]) for e in life.told("committed")]
    assert len(steps) == len(set(steps)) == 3  # the offer and two rounds, each once
    assert life.told("refused") == []
    assert len(life.told("files")) == 2  # of the base: both adapters were made on the devices
    assert life.service.registry.promoted("tiny").release == "base-fedavg-2"


def test_a_late_device_and_a_staged_release_reach_everyone(
    live: Callable[[str], Life], tmp_path: Path
) -> None:
    life = live("fedavg")
    thread = threading.Thread(target=lambda: life.service.serve(stay=True))
    thread.start()
    until(lambda: life.told("started"))
    life.enrol("kitchen-1")
    life.enrol("garage-1")
    until(lambda: life.told("done"), 90)

    late = life.enrol("cellar-1")
    until(lambda: late.status()["release"] == "base-fedavg-2", 60)

    save_tiny(tmp_path / "other", intermediate_size=64)
    options = SlmOptions(accuracy_level=1)
    export_slm(
        tmp_path / "other", tmp_path / "r2", family="tiny", release="r2", task=TASK, options=options
    )
    registry, book = life.service.registry, life.service.book
    registry.publish(Publish("tiny", "r2", tmp_path / "r2"), promote=False)
    plan = Plan(size=1, max_drop=1.0, min_speed=0.0, promote=True)
    book.stage("tiny", "r2", plan, who="ann", why="a better one")
    until(lambda: {d.status()["release"] for d in life.devices} == {"r2"}, 90)
    assert len(book.history("tiny")[0].canary) == 1

    until(lambda: book.history("tiny")[0].settled, 30)
    file = life.folder / "coordinator.toml"
    file.write_text(coordinator_toml(life.folder, life.name))
    command = [sys.executable, "-m", "edge_sdk", "release", "roll-back", "tiny", "--json"]
    subprocess.run([*command, "--why", "it was not", "--config", str(file)], cwd=ROOT, check=True)
    until(lambda: {d.status()["release"] for d in life.devices} == {"base-fedavg-2"}, 90)
    states = [(e["release"], e["state"]) for e in life.told("rollout")]
    assert states[-2:] == [("r2", "promoted"), ("r2", "rolled-back")]
    assert [line["action"] for line in book.audit("tiny")] == ["stage", "promote", "roll-back"]
    assert book.audit("tiny")[-1]["why"] == "it was not"

    life.service.stop()
    thread.join(30)
    assert life.told("reply_refused") == []
