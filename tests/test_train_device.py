"""A device's own rules for training: its ceiling of memory, its battery, going on after both."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from edge_sdk import learning_tasks
from edge_sdk.agent import EdgeDevice
from edge_sdk.errors import Postponed
from edge_sdk.train import policy
from edge_sdk.train.policy import GO, Answer, Gate, Power, Verdict
from edge_sdk.wire.messages import AdapterUpdate, Refused
from tests.edge_world import Coordinator, example_set, offer, order, releases
from tests.test_edge_device import asked, enrolled, opened

RULES = "[train]\nmin_charge = 30\npatience_s = {patience}\nmemory_mb = {memory}\n"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path, releases(tmp_path))
    yield made
    made.close()


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> list[Power]:
    """What the device reads, one by one; the last for ever."""
    said = [Power(80, mains=False)]
    monkeypatch.setattr(policy, "read_power", lambda: said.pop(0) if len(said) > 1 else said[0])
    return said


@pytest.fixture(autouse=True)
def _no_waiting_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_tasks, "Gate", partial(Gate, in_place_s=0))


def ready(coordinator: Coordinator, made: EdgeDevice) -> EdgeDevice:
    enrolled(coordinator, made)
    made.add_examples(example_set(30))
    asked(coordinator, made, offer(coordinator.publisher, "r1"), until=2)
    return made


def test_a_training_put_off_for_the_battery_is_taken_up_again(
    coordinator: Coordinator, tmp_path: Path, power: list[Power]
) -> None:
    with opened(coordinator, tmp_path, RULES.format(patience=60, memory=0)) as device:
        ready(coordinator, device)
        kept = tmp_path / "state" / learning_tasks.CHECKPOINT
        fine, low = Power(80, mains=False), Power(5, mains=False)
        power[:] = [fine, fine, fine, low]  # before loading and before the first two steps
        with pytest.raises(Postponed, match="battery at 5 %"):
            asked(coordinator, device, order(task_id="t"))
        assert kept.exists()
        power[:] = [fine]
        (reply,) = coordinator.talk(device, until=1)

    assert isinstance(reply, AdapterUpdate)
    assert not kept.exists()


def test_out_of_patience_or_of_memory_it_says_so(
    coordinator: Coordinator, tmp_path: Path, power: list[Power]
) -> None:
    with opened(coordinator, tmp_path, RULES.format(patience=0, memory=1)) as device:
        ready(coordinator, device)
        (refused,) = asked(coordinator, device, order(task_id="small"))
        power[:] = [Power(5, mains=False)]
        (tired,) = asked(coordinator, device, order(task_id="tired"))

    assert isinstance(refused, Refused)
    assert "train.memory_mb allows 1" in refused.reason
    assert isinstance(tired, Refused)
    assert "battery at 5 %, below 30" in tired.reason


def test_an_application_puts_training_off_by_a_policy_of_its_own(
    coordinator: Coordinator, tmp_path: Path, power: list[Power]
) -> None:
    """By the settings it would wait for the battery; the application's word takes their place."""
    power[:] = [Power(5, mains=False)]
    says = [GO, GO, Answer(Verdict.WAIT, "the user is typing")]  # loading, one step, then not now
    asked_of_it = []

    def application() -> Answer:
        asked_of_it.append(says.pop(0) if len(says) > 1 else says[0])
        return asked_of_it[-1]

    rules = RULES.format(patience=60, memory=0)
    with opened(coordinator, tmp_path, rules, policy=application) as device:
        ready(coordinator, device)
        with pytest.raises(Postponed, match="the user is typing"):
            asked(coordinator, device, order(task_id="t"))
        put_off = [answer.verdict for answer in asked_of_it]
        says[:] = [GO]
        (reply,) = coordinator.talk(device, until=1)

    assert put_off == [Verdict.GO, Verdict.GO, Verdict.WAIT]
    assert isinstance(reply, AdapterUpdate)
