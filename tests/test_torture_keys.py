"""Short forms of the figures about keys and lives: F8, F10, B7, B8, B9."""

import importlib
from pathlib import Path

import pytest

from tests.torture.result import Scale


@pytest.mark.broker
@pytest.mark.parametrize(
    "module",
    ["f8_clocks", "f10_rotation", "b7_enrolment", "b8_tenants", "b9_revocation"],
)
def test_figure(module: str, tmp_path: Path) -> None:
    result = importlib.import_module(f"tests.torture.{module}").run(Scale.SHORT, 7, tmp_path)

    assert result.passed, str(result)
