"""FedMKT's service killed amid a round: it goes on from its last Commit, and counts all once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_world import TASK, example_set
from edge_world import config as edge_config
from exporters_tiny import save_tiny
from service_world import Devices, settings
from test_coordinator_service_fedmkt import save_pairs

from coordinator.config import CoordinatorConfig
from coordinator.desk import Desk
from edge_sdk.agent import EdgeDevice
from edge_sdk.link.broker import Broker, start_broker
from edge_sdk.link.mqtt import MqttLink

NAMES = ("garage-1", "kitchen-1")
ROUNDS = 2
KILLS = ("TeachAdapter",)
"""The service is killed when the first answer to this task of round 1 is in; one kill takes a
second life, and that imports torch."""
PROGRAM = f"""
name = "fedmkt"
cohort = {len(NAMES)}
rounds = {ROUNDS}
"""
MORE = """
[fedmkt]
kept = 8
steps = 2
batch = 4
teach_on_devices = true
held_out = 4
max_rise = 100.0
[defence]
max_drop = 1.0
[public]
path = "{folder}/public.jsonl"
"""
ASKED = ("TeachAdapter", "TopLogits", "TrainAdapter")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    users = dict.fromkeys(("coordinator", *NAMES), "secret")
    with start_broker(tmp_path / "broker", users=users) as running:
        yield running


class Life:
    """One process of the service, from its start to its end or to a SIGKILL."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        version = "3.1.1" if broker.kind == "amqtt" else "5"
        script = Path(__file__).with_name("fedmkt_process.py")
        self.process = subprocess.Popen(
            [
                sys.executable, str(script), str(folder / "coordinator.toml"),
                broker.url_for("coordinator"), version,
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = (json.loads(line) for line in self.process.stdout)

    def until(self, **wanted: object) -> list[dict[str, object]]:
        """The events up to the first that has all of these values; all of them if none has."""
        seen = []
        for event in self.lines:
            seen.append(event)
            if wanted and wanted.items() <= event.items():
                break
        return seen

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


Counts = list[tuple[str, str, int]]


def counted(config: CoordinatorConfig) -> tuple[list[tuple[str, str, str, int]], Counts, int]:
    """Who counted with what in which round and step; how often it was asked for; refusals."""
    with Desk(config) as desk:
        assert desk.mailbox.unread() == []
        with desk.store.transaction() as db:
            rows = db.execute(
                "SELECT kind, device, round, step FROM counted WHERE run = 'fedmkt'"
                " AND kind != 'OfferModel' ORDER BY 1, 2, 3, 4"
            ).fetchall()
            asked = db.execute(
                "SELECT kind, device, COUNT(*) FROM asks WHERE run = 'fedmkt'"
                " AND kind != 'OfferModel' GROUP BY 1, 2 ORDER BY 1, 2"
            ).fetchall()
            query = "SELECT COUNT(*) FROM refused WHERE kind != 'OfferModel'"
            (refused,) = db.execute(query).fetchone()
        return rows, asked, refused


@pytest.mark.broker
@pytest.mark.slow
def test_killed_amid_a_round_it_ends_and_counts_everybody_once(
    broker: Broker, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "bytes")
    save_pairs(tmp_path / "llm")
    rows = [json.dumps({"text": e.text, "label": e.label}) for e in example_set(8)]
    (tmp_path / "public.jsonl").write_text("\n".join(rows))
    more = MORE.format(folder=tmp_path)
    text = settings(tmp_path, PROGRAM, families=["bytes"], task=TASK, more=more)
    (tmp_path / "coordinator.toml").write_text(text)
    config = CoordinatorConfig.load(tmp_path / "coordinator.toml")
    version = "3.1.1" if broker.kind == "amqtt" else "5"

    lives = [Life(tmp_path, broker)]
    told = lives[0].until(event="started")
    with Devices() as devices, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(lambda: lives[-1].kill())
        for n, name in enumerate(NAMES):
            own = f'[train]\nthreads = 1\nseed = {n}\n[device]\nfamilies = ["bytes"]'
            link = MqttLink(broker.url_for(name), mqtt_version=version)
            device = EdgeDevice(edge_config(tmp_path / name, own), link=link)
            devices.add(device, example_set(6))
            with Desk(config) as desk:
                code = desk.token(name, lasts_s=600).to_text()
            device.enrol(code, timeout_s=300.0)
        devices.start()
        for kind in KILLS:
            told += lives[-1].until(event="asked", kind=kind, step=1)
            told += lives[-1].until(event="reply")
            lives[-1].kill()
            lives.append(Life(tmp_path, broker))
        told += lives[-1].until()
        assert lives[-1].process.wait() == 0

    assert [e["step"] for e in told if e["event"] == "committed" and e["run"] == "fedmkt"] == [0, 1]
    assert sum(e["event"] == "done" for e in told) == 1
    found, asked, refused = counted(config)
    assert found == [(k, n, str(r), r) for k in ASKED for n in NAMES for r in range(ROUNDS)]
    assert asked == [(k, n, ROUNDS) for k in ASKED for n in NAMES]  # nothing was sent again
    assert refused == 0
