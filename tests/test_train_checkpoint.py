"""A training that is killed goes on where it was: same factors bit for bit, nothing left behind."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from edge_sdk.errors import DataError, FleetError, Postponed
from edge_sdk.train.checkpoint import Checkpoint, key_of
from edge_sdk.train.lora import Adapter, LoraSpec, start_factors
from edge_sdk.train.trainer import optimize
from tests.learning_world import model
from tests.training_process import ORDER, bundle, train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    bundle(tmp_path / "bundle")
    return tmp_path


class Counter:
    """A gate that counts the steps really taken, and may put the training off at one of them."""

    def __init__(self, stop_at: int = -1) -> None:
        self.steps, self.stop_at = 0, stop_at

    def __call__(self) -> None:
        if self.steps == self.stop_at:
            raise Postponed("not now")
        self.steps += 1


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_after_a_kill_it_goes_on_to_the_same_factors(place: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training_process", str(place)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "step 5":
            break
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait(timeout=30) == -signal.SIGKILL
    kept = place / "checkpoint"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600

    counter = Counter()
    change = train(place, gate=counter)

    assert counter.steps <= ORDER.steps - 5
    assert not kept.exists()
    assert same(change, train(place))


def test_put_off_it_keeps_where_it_is_and_goes_on(place: Path) -> None:
    with pytest.raises(Postponed):
        train(place, gate=Counter(stop_at=7))
    assert (place / "checkpoint").exists()

    counter = Counter()
    change = train(place, gate=counter)

    assert counter.steps == ORDER.steps - 7
    assert same(change, train(place))


@pytest.mark.parametrize("changed", [{"task_id": "t2"}, {"lr": 0.02}, {"adapter_seed": 2}])
def test_a_checkpoint_of_other_inputs_is_not_taken(place: Path, changed: dict) -> None:
    with pytest.raises(Postponed):
        train(place, gate=Counter(stop_at=7))
    other, counter = msgspec.structs.replace(ORDER, **changed), Counter()

    change = train(place, order=other, gate=counter)

    assert counter.steps == ORDER.steps
    assert same(change, train(place, order=other))


def test_a_damaged_checkpoint_is_not_taken(place: Path) -> None:
    with pytest.raises(Postponed):
        train(place, gate=Counter(stop_at=7))
    kept = place / "checkpoint"
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    for damaged in (bytes(data), bytes(data[: len(data) // 2]), b""):
        kept.write_bytes(damaged)
        counter = Counter(stop_at=1)
        with pytest.raises(Postponed):
            train(place, gate=counter)
        assert counter.steps == 1


def test_a_training_that_fails_leaves_nothing(place: Path) -> None:
    def fail() -> None:
        raise DataError("enough")

    with pytest.raises(Postponed):
        train(place, gate=Counter(stop_at=3))
    with pytest.raises(FleetError, match="enough"):
        train(place, gate=fail)
    assert not (place / "checkpoint").exists()


def test_a_full_disk_does_not_stop_the_training(place: Path, caplog) -> None:
    whole = train(place)
    (place / "checkpoint").mkdir()  # nothing can be renamed onto a folder
    (place / "checkpoint" / "x").touch()

    adapter = Adapter(model(), LoraSpec(2, 4.0, ("q_proj",)))
    adapter.load(start_factors(adapter.layout, 0))
    kept = Checkpoint(place / "checkpoint", key_of(b"k"), every_s=0)
    ids = torch.tensor([[3, 4, 5]])
    losses = list(
        optimize(
            adapter,
            lambda: adapter.model(input_ids=ids, labels=ids).loss,
            steps=2,
            lr=0.01,
            checkpoint=kept,
        )
    )

    assert len(losses) == 2
    assert "no checkpoint after step 2" in caplog.text
    assert whole
    assert not list(place.glob(".new-*"))


def test_it_is_written_no_oftener_than_asked(tmp_path: Path) -> None:
    adapter = Adapter(model(), LoraSpec(2, 4.0, ("q_proj",)))
    adapter.load(start_factors(adapter.layout, 0))
    ids, now, written = torch.tensor([[3, 4, 5]]), [0.0], []
    path = tmp_path / "checkpoint"
    kept = Checkpoint(path, key_of(b"k"), every_s=60, clock=lambda: now[0])

    def loss() -> torch.Tensor:
        written.append(os.stat(path).st_ino if path.exists() else None)
        now[0] += 25.0
        return adapter.model(input_ids=ids, labels=ids).loss

    list(optimize(adapter, loss, steps=8, lr=0.01, checkpoint=kept))

    assert [written[i] == written[i - 1] for i in range(1, 8)] == [
        True, True, False, True, True, False, True,
    ]  # fmt: skip


def test_keys_tell_parts_apart() -> None:
    assert key_of(b"ab", b"c") != key_of(b"a", b"bc")
