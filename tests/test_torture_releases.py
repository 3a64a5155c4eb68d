"""The short forms of B5 and B6: hostile models and attacks on updates, one test each."""

from pathlib import Path

import pytest

from tests.torture import b5_hostile_onnx, b6_updates
from tests.torture.result import Scale


@pytest.mark.parametrize("attack", b6_updates.ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_on_updates_is_refused(attack, tmp_path: Path) -> None:
    attack(b6_updates.World(tmp_path))


def test_b6_notices_an_attack_that_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmless(world: b6_updates.World) -> None:
        with world.refused(Exception):
            world.install()

    monkeypatch.setattr(b6_updates, "ATTACKS", (harmless, *b6_updates.ATTACKS[:15]))

    result = b6_updates.run(Scale.SHORT, 7, tmp_path)

    assert (result.value, result.passed) == (1, False)
    assert str(result.notes["harmless"]).startswith("ACCEPTED")


@pytest.mark.parametrize("case", b5_hostile_onnx.CASES, ids=lambda case: case.name)
def test_a_hostile_model_reads_nothing_outside(case: b5_hostile_onnx.Case, tmp_path: Path) -> None:
    assert b5_hostile_onnx.trial(case, tmp_path / "x") == {"reads": 0, "unsigned_loads": 0}


def test_b5_watches_what_it_says(tmp_path: Path) -> None:
    assert b5_hostile_onnx.bare_runtime_follows(tmp_path / "bare")
    assert b5_hostile_onnx.run(Scale.SHORT, 7, tmp_path / "all").passed
