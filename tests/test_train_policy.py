"""When training waits: battery and load as Linux tells them, and what waiting leads to."""

from pathlib import Path

import pytest

from edge_sdk.errors import Postponed, RuntimeFailure
from edge_sdk.train.policy import GO, Answer, Gate, Power, Spare, Verdict, read_power

WAIT = Answer(Verdict.WAIT, "battery at 5 %")


def supply(folder: Path, name: str, **values: str) -> None:
    (folder / name).mkdir(parents=True)
    for key, value in values.items():
        (folder / name / key).write_text(value + "\n")


class Clock:
    """Time passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def gate(answers, clock: Clock, **how: float) -> Gate:
    said = iter(answers)
    return Gate(lambda: next(said), clock=clock, sleep=clock.sleep, **{"patience_s": 100} | how)


def test_reads_battery_and_mains(tmp_path: Path) -> None:
    assert read_power(tmp_path / "absent") == Power(None, mains=True)
    supply(tmp_path, "BAT0", type="Battery", capacity="40", status="Discharging")
    supply(tmp_path, "mouse", type="Battery", capacity="3", scope="Device", status="Discharging")
    assert read_power(tmp_path) == Power(40, mains=False)
    supply(tmp_path, "BAT1", type="Battery", capacity="60", status="Unknown")
    supply(tmp_path, "AC", type="Mains", online="0")
    assert read_power(tmp_path) == Power(50, mains=False)
    (tmp_path / "AC" / "online").write_text("1\n")
    assert read_power(tmp_path) == Power(50, mains=True)


def test_a_charging_battery_is_mains_and_one_that_says_nothing_is_none(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="4", status="Charging")
    assert read_power(tmp_path) == Power(4, mains=True)
    (tmp_path / "BAT0" / "capacity").unlink()
    assert read_power(tmp_path) == Power(None, mains=True)


@pytest.mark.parametrize(
    ("power", "load", "verdict"),
    [
        (Power(29, mains=False), 0.0, Verdict.WAIT),
        (Power(30, mains=False), 0.0, Verdict.GO),
        (Power(5, mains=True), 0.0, Verdict.GO),
        (Power(None, mains=True), 0.0, Verdict.GO),
        (Power(90, mains=False), 3.0, Verdict.GO),  # (3 - 1 own) / 4 cores
        (Power(90, mains=False), 3.1, Verdict.WAIT),
    ],
)
def test_trains_with_what_is_to_spare(power: Power, load: float, verdict: Verdict) -> None:
    policy = Spare(30, 0.5, 1, power=lambda: power, load=lambda: load, cores=4)
    assert policy().verdict is verdict


def test_by_default_nothing_is_looked_at() -> None:
    def never() -> Power:
        raise AssertionError("looked")

    assert Spare(power=never, load=lambda: 99.0)() is GO


def test_a_short_wait_is_waited_in_place() -> None:
    clock = Clock()
    passing = gate([GO, WAIT, WAIT, GO], clock, in_place_s=10)

    passing()
    assert clock.now == 0
    passing()

    assert clock.now == 2


def test_a_longer_wait_puts_off_and_a_very_long_one_gives_up() -> None:
    clock = Clock()
    waiting = gate([WAIT] * 1000, clock, in_place_s=10)

    for _ in range(9):
        with pytest.raises(Postponed, match="battery at 5 %"):
            waiting()
        clock.sleep(1)
    with pytest.raises(RuntimeFailure, match="waited 100 s to train: battery at 5 %"):
        waiting()


def test_stop_is_said_to_the_coordinator() -> None:
    with pytest.raises(RuntimeFailure, match="stopped training: lid closed"):
        gate([Answer(Verdict.STOP, "lid closed")], Clock())()
