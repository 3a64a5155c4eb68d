"""FedMKT over a real broker: a service, two families of unlike tokenizers, one device that lies."""

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from coordinator_world import until
from edge_world import TASK, example_set
from edge_world import config as edge_config
from exporters_tiny import save_tiny
from service_world import settings
from tokenizers import Tokenizer

from coordinator.config import CoordinatorConfig
from coordinator.service import Service
from edge_sdk.agent import EdgeDevice
from edge_sdk.handled import Handled
from edge_sdk.learning_tasks import LearningDesk
from edge_sdk.link.broker import Broker, start_broker
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.wire.config_rules import parse_toml
from edge_sdk.wire.messages import LogitRows, TopLogits

DEVICES = {"kitchen-1": "bytes", "garage-1": "pairs", "liar-1": "bytes"}
PROGRAM = """
name = "fedmkt"
cohort = 3
rounds = 2
"""
MORE = """
[fedmkt]
kept = 8
steps = 2
batch = 4
held_out = 4
max_rise = 100.0
[defence]
max_drop = 1.0
[public]
path = "{folder}/public.jsonl"
[evaluation]
path = "{folder}/public.jsonl"
"""


def save_pairs(folder: Path) -> None:
    """A model whose tokenizer joins some bytes, so that the same text has other tokens."""
    save_tiny(folder, intermediate_size=64)
    path = folder / "tokenizer.json"
    plan = json.loads(path.read_text())
    for pair in ("re", "qu", "es", "op", "en", "li", "st", "na", "me"):
        plan["model"]["merges"].append([pair[0], pair[1]])
        plan["model"]["vocab"][pair] = len(plan["model"]["vocab"])
    path.write_text(json.dumps(plan))
    assert Tokenizer.from_file(str(path)).encode("open").tokens == ["op", "en"]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    users = dict.fromkeys(("coordinator", *DEVICES), "secret")
    with start_broker(tmp_path / "broker", users=users) as running:
        yield running


def lie_of(desk: LearningDesk, task: TopLogits, honest: object) -> Handled:
    """What the desk answers, with token ids that no vocabulary has on the device that lies."""
    handled: Handled = honest(desk, task)  # type: ignore[operator]
    (rows,) = handled.replies
    if "liar" not in desk._config.device.state_dir or not isinstance(rows, LogitRows):
        return handled
    ids = np.full(len(rows.ids) // 2, 60_000, "<u2").tobytes()
    return Handled((msgspec.structs.replace(rows, ids=ids),))


@pytest.mark.broker
def test_two_families_learn_with_the_llm_and_a_liar_is_left_out(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = LearningDesk.top_logits
    monkeypatch.setattr(LearningDesk, "top_logits", lambda desk, task: lie_of(desk, task, honest))
    save_tiny(tmp_path / "bytes")
    save_tiny(tmp_path / "llm", hidden_size=32, intermediate_size=48)
    save_pairs(tmp_path / "pairs")
    lines = [json.dumps({"text": e.text, "label": e.label}) for e in example_set(8)]
    (tmp_path / "public.jsonl").write_text("\n".join(lines))
    version = "3.1.1" if broker.kind == "amqtt" else "5"

    def link(name: str) -> MqttLink:
        return MqttLink(broker.url_for(name), mqtt_version=version)

    stream = io.StringIO()
    more = MORE.format(folder=tmp_path)
    text = settings(tmp_path, PROGRAM, families=["bytes", "pairs"], task=TASK, more=more)
    config = parse_toml(text, CoordinatorConfig, "test")
    service = Service(config, link=link("coordinator"), stream=stream)

    def told(name: str) -> list[dict[str, object]]:
        found = [json.loads(line) for line in stream.getvalue().splitlines()]
        return [line for line in found if line["event"] == name]

    outcome: list[object] = []
    serving = threading.Thread(target=lambda: outcome.append(service.serve()))
    serving.start()
    devices: list[EdgeDevice] = []
    try:
        until(lambda: told("started"), 30)
        for n, (name, family) in enumerate(DEVICES.items()):
            own = f'[train]\nthreads = 1\nseed = {n}\n[device]\nfamilies = ["{family}"]'
            device = EdgeDevice(edge_config(tmp_path / name, own), link=link(name))
            devices.append(device)
            device.add_examples(example_set(6))
            device.enrol(service.desk.token(name, lasts_s=600).to_text())
        while serving.is_alive():
            for device in devices:  # in turn: transformers does not load in two threads at once
                device.step(timeout_s=0.02)
        lineages = {family: service.registry.lineage(family) for family in ("bytes", "pairs")}
    finally:
        service.stop()
        serving.join(60)
        for device in devices:
            device.close()
        service.close()

    assert outcome == [True]
    rounds = [note for note in told("note") if "round" in note]
    assert [note["round"] for note in rounds] == [0, 1]
    for note in rounds:
        assert note["devices"] == 3
        assert set(note["by"]) <= {"kitchen-1", "garage-1"}  # type: ignore[call-overload]
        assert {"taught_bytes", "taught_pairs", "bits_llm", "llm_accuracy"} <= set(note)
    refused = told("reply_refused")
    assert {(e["device"], e["kind"]) for e in refused} == {("liar-1", "LogitRows")}
    assert "token id 60000 is outside the vocabulary" in str(refused[0]["reason"])
    done = told("done")[0]
    assert done["releases"] == {"bytes": "base-distilled", "pairs": "base-distilled"}
    for lineage in lineages.values():
        assert [line["release"] for line in lineage] == ["base", "base-fedmkt-1", "base-distilled"]
        assert set(lineage[1]["lineage"]["rows"]) == {"kitchen-1", "garage-1"}
    assert len(list((tmp_path / "cloud" / "vocabularies").glob("mined-*.npy"))) >= 2
    assert TASK.labels == config.task.labels
