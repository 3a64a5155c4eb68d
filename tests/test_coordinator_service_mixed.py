"""CrossLM over a real broker: a decoder and two encoders, one service killed amid a round."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from edge_world import config as edge_config
from encoders_tiny import save_modernbert
from exporters_tiny import save_tiny
from learning_world import TASK, examples
from learning_world import folder as save_llm
from service_world import Devices, settings

from coordinator.config import CoordinatorConfig
from coordinator.desk import Desk
from edge_sdk.agent import EdgeDevice
from edge_sdk.collect import Example
from edge_sdk.encoders import EncoderSession
from edge_sdk.link.broker import Broker, start_broker
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.runtime import SlmSession

pytestmark = [pytest.mark.broker, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
FAMILY_OF = {"garage-1": "reader", "cellar-1": "reader", "kitchen-1": "writer"}
ROUNDS = 2
PROGRAM = f"""
name = "crosslm"
cohort = {len(FAMILY_OF)}
rounds = {ROUNDS}
samples = 12
tau = 0.0
max_new_tokens = 8
distil_steps = 2
score_on_devices = true
"""
MORE = """
[defence]
max_drop = 1.0
[public]
path = "{folder}/public.jsonl"
[evaluation]
path = "{folder}/public.jsonl"
"""


@dataclass
class Life:
    """What is seen of the run: the service's events by life, and the devices' own."""

    config: CoordinatorConfig
    devices: Devices
    killed_after: int
    events: list[dict[str, Any]] = field(default_factory=list)
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


def process_of(file: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "edge_sdk", "coordinator", "serve", "--events", "--config", file],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read(
    process: "subprocess.Popen[str]", into: list[dict[str, Any]], enough: Callable[[Any], bool]
) -> None:
    """Keep the process's events until one is `enough`, or it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        into.append(json.loads(line))
        if enough(into[-1]):
            return


def ended(process: "subprocess.Popen[str]") -> int:
    """Wait for its end, let go of its pipe and return its status."""
    assert process.stdout is not None
    status = process.wait(60)
    process.stdout.close()
    return status


def write_models(folder: Path) -> None:
    """Three models of three tokenizers; the encoder has no classifier yet."""
    save_tiny(folder / "writer")
    save_modernbert(folder / "reader", kind="ForMaskedLM")
    save_llm(folder / "llm", seed=4, width=48)
    rows = [json.dumps({"text": text, "label": label}) for text, label in examples(30, seed=55)]
    (folder / "public.jsonl").write_text("\n".join(rows))


def write_settings(folder: Path, broker: Broker) -> Path:
    (folder / "password").write_text("secret")
    version = "3.1.1" if broker.kind == "amqtt" else "5"
    service = f"""
broker = "{broker.url}"
password_file = "{folder}/password"
mqtt_version = "{version}"
"""
    file = folder / "coordinator.toml"
    file.write_text(
        settings(
            folder,
            PROGRAM,
            families=["writer", "reader"],
            task=TASK,
            service=service,
            more=MORE.format(folder=folder),
        )
    )
    return file


def enrol(life: Life, folder: Path, broker: Broker) -> None:
    version = life.config.service.mqtt_version
    with Desk(life.config) as desk:
        codes = {name: desk.token(name, lasts_s=600).to_text() for name in FAMILY_OF}
    for n, (name, family) in enumerate(FAMILY_OF.items()):
        own = f'[train]\nthreads = 1\nseed = {n}\n[device]\nfamilies = ["{family}"]'
        device = EdgeDevice(
            edge_config(folder / name, own),
            link=MqttLink(broker.url_for(name), mqtt_version=version),
            on_event=lambda event, name=name: life.told.append((name, event)),  # type: ignore[misc]
        )
        rows = [Example(text, label) for text, label in examples(12, seed=n)]
        life.devices.add(device, rows).enrol(codes[name])


def second_round(event: dict[str, Any], seen: list[dict[str, Any]]) -> bool:
    """Whether one update of the second round has come, and the others have not."""
    begun = any(e["event"] == "committed" and e["run"] == "crosslm" for e in seen)
    return begun and event["event"] == "reply" and event["kind"] == "AdapterUpdate"


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """A whole run, its service killed once when the first update of the second round had come."""
    folder = tmp_path_factory.mktemp("mixed")
    users = dict.fromkeys(("coordinator", *FAMILY_OF), "secret")
    write_models(folder)
    with start_broker(folder / "broker", users=users) as broker, Devices() as devices:
        file = write_settings(folder, broker)
        made = Life(CoordinatorConfig.load(file), devices, 0)
        process = process_of(file)
        try:
            read(process, made.events, lambda event: event["event"] == "started")
            enrol(made, folder, broker)
            devices.start()
            read(process, made.events, lambda event: second_round(event, made.events))
            process.send_signal(signal.SIGKILL)
            assert ended(process) == -signal.SIGKILL
            made.killed_after = len(made.events)
            process = process_of(file)
            read(process, made.events, lambda event: event["event"] == "done")
            assert ended(process) == 0
        finally:
            process.kill()
            ended(process)
        yield made


def test_no_update_is_lost_or_counted_twice(life: Life) -> None:
    before = life.events[: life.killed_after]
    assert [e["step"] for e in before if e["event"] == "committed"][-1] == 0

    with Desk(life.config) as desk, desk.store.transaction() as db:
        counted = db.execute(
            "SELECT step, device FROM counted WHERE run = 'crosslm' AND kind = 'TrainAdapter'"
            " ORDER BY 1, 2"
        ).fetchall()
        commits = db.execute("SELECT step FROM commits WHERE run = 'crosslm' ORDER BY 1").fetchall()
        refused = db.execute("SELECT device, kind, reason FROM refused").fetchall()

    assert counted == [(step, name) for step in range(ROUNDS) for name in sorted(FAMILY_OF)]
    assert commits == [(step,) for step in range(ROUNDS)]
    assert refused == []
    assert life.of("reply_refused") == []


def test_both_families_learn_and_score_and_get_the_same_synthetic_texts(life: Life) -> None:
    notes = {note["round"]: note for note in life.of("note") if "round" in note}
    assert sorted(notes) == list(range(ROUNDS))
    assert all(note["devices"] == len(FAMILY_OF) for note in notes.values())
    assert notes[1]["pool"] > 0

    kinds = {(name, e["kind"]) for name, e in life.told if e["event"] == "task"}
    wanted = ("TrainAdapter", "Score", "OfferData", "OfferModel")
    assert kinds >= {(name, kind) for name in FAMILY_OF for kind in wanted}
    sets = {name: e["texts"] for name, e in life.told if e["event"] == "data"}
    assert set(sets) == set(FAMILY_OF)
    assert len(set(sets.values())) == 1


def test_devices_of_both_kinds_made_their_adapters_files(life: Life) -> None:
    """The service is another process; the bases and the last releases are whole models."""
    assert sorted(event["device"] for event in life.of("files")) == sorted(2 * [*FAMILY_OF])


def test_both_families_end_with_a_release_that_runs_and_says_what_it_is_made_from(
    life: Life,
) -> None:
    done = life.of("done")[0]
    assert done["releases"] == dict.fromkeys(("writer", "reader"), "base-distilled")
    assert {device.status()["release"] for device in life.devices.all} == {"base-distilled"}
    text = examples(1, seed=9)[0][0]
    assert all(device.classify(text) in TASK.labels for device in life.devices.all)
    sessions = {name: type(d.session) for name, d in zip(FAMILY_OF, life.devices.all, strict=True)}
    kinds = {"writer": SlmSession, "reader": EncoderSession}
    assert sessions == {name: kinds[family] for name, family in FAMILY_OF.items()}

    with Desk(life.config) as desk:
        for family in kinds:
            lines = desk.registry().lineage(family)
            assert [line["release"] for line in lines] == [
                "base", "base-crosslm-1", "base-distilled",
            ]  # fmt: skip
            own = sorted(name for name, its in FAMILY_OF.items() if its == family)
            for step, line in enumerate(lines[1:]):
                assert line["lineage"]["round"] == step
                assert sorted(device for device, *_ in line["lineage"]["updates"]) == own
